"""Axolotl's own validation as part of every check: in a child process, kept, and at the key it names."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import ASK_CHILD, config_with, recipe_config, typed

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.files import Row
from qlora_recipes.base.yamlfiles import Config
from qlora_recipes.check import check
from qlora_recipes.config.compose import Request
from qlora_recipes.config.gpus import ANY_GPU, Gpu
from qlora_recipes.training import validation

NAME = "haider2024/code-llama-7b"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of configs that each child process has validated; the cache is empty."""
    numbers = []

    def ask(configs: list[Config], gpu: Gpu) -> list[list[Row]]:
        numbers.append(len(configs))
        return ASK_CHILD(configs, gpu)

    monkeypatch.setattr(validation, "_ask_child", ask)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))
    return numbers


@pytest.mark.parametrize(
    ("change", "name", "line"),
    [
        ({"load_in_4bit": False}, "axolotl:load_in_4bit", "load_in_4bit: false"),
        ({"max_packed_sequence_len": 512}, "axolotl:max_packed_sequence_len", "max_packed_sequence_len: 512"),
    ],
)
def test_a_config_that_axolotl_refuses_fails_its_check_at_the_key(tmp_path, recipe, change, name, line):
    file = tmp_path / "mine.yaml"
    file.write_text(yamlfiles.write_yaml(config_with(change)))
    done = recipe.fails("check", "mine.yaml")
    number = file.read_text().splitlines().index(line) + 1
    assert places_of_errors(done.stdout) == {name: f"mine.yaml:{number}"}
    assert "next:" not in done.stderr
    started = recipe.fails("run", "mine.yaml", "--rehearse")
    assert name in places_of_errors(started.stderr)
    assert not (tmp_path / "runs").exists()


def places_of_errors(output: str) -> dict[str, str]:
    """Place of each error in an output, by the error's name, which is at the end of its line, in brackets."""
    errors = [line.split(": error: ") for line in output.splitlines() if ": error: " in line]
    return {error.rpartition("[")[2].rstrip("]"): place for place, error in errors}


def test_a_message_without_a_key_of_the_config_stands_at_the_file(tmp_path, recipe):
    config = config_with({"datasets": None, "test_datasets": None, "evals_per_epoch": None})
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(config))
    places = places_of_errors(recipe.fails("check", "mine.yaml").stdout)
    assert places["axolotl"] == "mine.yaml:1"


def test_what_a_rule_has_found_is_not_said_twice(tmp_path, recipe):
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"num_epochs": "two"})))
    (report,) = recipe.json("check", "mine.yaml", code=2)
    names = [finding["name"] for finding in report["findings"] if finding["key"] == "num_epochs"]
    assert names == ["value:num_epochs"]


def test_a_quick_check_leaves_it_out_says_so_and_recommends_nothing(recipe, asked):
    done = recipe.ok("check", NAME, "--quick", "--set", "load_in_4bit=false")
    assert asked == []
    assert "next:" not in done.stderr
    assert "not validated by Axolotl (--quick)" in done.stderr
    complete = recipe.ok("check", NAME)
    assert asked == [1]
    assert "next: recipe plan" in complete.stderr


def test_one_process_validates_all_configs_and_what_passes_is_kept(asked):
    requests = [Request(NAME), Request(NAME, overrides=typed("load_in_4bit=false"))]

    def errors() -> list[list[str]]:
        reports = [check.check_request(request) for request in requests]
        check.add_validation(reports, None)
        return [[finding.name for finding in report.findings if finding.level == "error"] for report in reports]

    expected = [[], ["axolotl:load_in_4bit"]]
    assert errors() == expected
    assert asked == [2]
    assert errors() == expected
    assert asked == [2, 1]  # installing a package can correct an error
    check.add_validation([check.check_request(requests[0])], Gpu("T4", (7, 5)))
    assert asked == [2, 1, 1]


def test_an_environment_without_axolotl_is_a_warning(recipe, asked, tmp_path, monkeypatch):
    (tmp_path / "broken" / "axolotl").mkdir(parents=True)
    (tmp_path / "broken" / "axolotl" / "__init__.py").write_text("raise ImportError('no axolotl for this test')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    done = recipe.ok("check", NAME)
    assert done.stdout.splitlines()[-1].partition(": warning: ")[2] == (
        "not validated, because Axolotl does not run here: ImportError: no axolotl for this test; run `recipe doctor` "
        "[not-validated]"
    )
    assert "next:" not in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.delenv("PYTHONPATH")
    assert "[not-validated]" not in recipe.ok("check", NAME).stdout


def test_plugins_of_an_unreadable_kind_are_not_imported(recipe, tmp_path, monkeypatch, asked):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Plugin: pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"plugins": {"a_module.Plugin": 1}})))
    recipe.fails("check", "mine.yaml")
    assert asked == [1]
    assert not (tmp_path / "ran").exists()


CHECKED = f"""
import subprocess, sys
from qlora_recipes.cli import main
if sys.argv[1] == "again":
    subprocess.Popen = None  # Axolotl is not asked
assert main(["check", "{NAME}"]) == 0
print({{"torch", "transformers", "axolotl"}} & set(sys.modules))
"""


@pytest.mark.long
def test_a_check_imports_nothing_slow_and_a_second_one_starts_no_process(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for when in ("first", "again"):
        command = [sys.executable, "-c", CHECKED, when]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["set()"]), done.stderr


PLANTED: list[dict[str, Any]] = [
    {"load_in_4bit": False},
    {"load_in_8bit": True},
    {"adapter": None},
    {"adapter": "qlra"},
    {"adapter": "mixlora"},
    {"max_packed_sequence_len": 512},
    {"num_epochs": "two"},
    {"learning_rate": None},
    {"base_model": None},
    {"datasets": []},
    {"datasets": None},
    {"datasets": [{"path": ["a"], "type": "alpaca"}]},
    {"datasets": [{"path": "a", "type": "alpaca", "shards": "many"}]},
    {"datasets": [{"path": "a", "type": "chat_template", "message_property_mappings": 3}]},
    {"test_datasets": [{"path": "a", "shards": "many"}]},
    {"warmup_steps": 1, "warmup_ratio": 0.1},
    {"val_set_size": 0.1},
    {"eval_strategy": "epoch"},
    {"chunked_cross_entropy": True, "cut_cross_entropy": True},
    {"sample_packing": True, "attn_implementation": "fp8"},
    {"dataset_processes": 4},
    {"fp8": True},
    {"relora": True},
    {"lora_target_linear": True, "lora_mlp_kernel": True, "lora_dropout": 0.5},
    {"early_stopping_patience": 3},
    {"saves_per_epoch": 1, "save_steps": 10},
    {"neftune_noise_alpha": -1.0},
    {"gradient_accumulation_steps": 2, "batch_size": 8},
    {"rl": "dpo"},
    {"rl": "simpo", "warmup_ratio": 0.1, "warmup_steps": None},
    {"context_parallel_size": 2},
    {"context_parallel_size": 2, "context_parallel": {"size": 4}},
    {"expert_parallel_size": 2},
    {"fsdp_config": {"offload_params": True}, "fsdp_version": 1},
    {"deepspeed": "missing.json"},
    {"flash_attention": True, "sdp_attention": True},
    {"special_tokens": {"pad_token": 3}},
]


@pytest.mark.long
def test_the_schema_alone_finds_what_all_of_axolotl_finds(monkeypatch):
    configs = [recipe_config(name) for name in paths.recipe_names()]
    configs += [config_with(change) for change in PLANTED]
    from qlora_recipes.base.hub import importing_axolotl

    by_schema = ASK_CHILD(configs, ANY_GPU)
    monkeypatch.setattr(validation, "exceeds_schema", lambda _: True)
    with importing_axolotl():
        by_axolotl = [validation.findings(config, ANY_GPU) for config in configs]
    for config, rows, findings in zip(configs, by_schema, by_axolotl, strict=True):
        assert rows == list(map(asdict, findings)), yamlfiles.write_yaml(config)
    refused = [rows for rows in by_schema if "error" in {row["level"] for row in rows}]
    assert len(refused) >= 20
