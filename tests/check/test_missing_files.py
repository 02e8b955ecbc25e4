"""A local file that a config names and that is missing: an error of commands that read it, with similar names."""

import os
from pathlib import Path

import pytest
from conftest import config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.paths import absence
from qlora_recipes.config.compose import Request
from qlora_recipes.plan import plan

LLAMA_2 = "haider2024/llama-2-7b"
ROWS = '{"instruction": "Ask.", "output": "Yes."}\n' * 40


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A config whose rows were renamed."""
    (tmp_path / "support.jsonl").write_text(ROWS)
    change = {"datasets": [{"path": "suport.jsonl", "type": "alpaca"}], "test_datasets": None, "warmup_steps": 0}
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(config_with(change | {"evals_per_epoch": None})))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ("check", "mine.yaml", "--all-rows"),
        ("check", "mine.yaml", "--show-tokens", "1"),
        ("run", "mine.yaml"),
        ("run", "mine.yaml", "--rehearse"),
        ("sweep", "mine.yaml", "--set", "lora_r=8,16"),
        ("sweep", "mine.yaml", "--set", "lora_r=8,16", "--rehearse"),
        ("reproduce", "haider2024", "--only", LLAMA_2, "--set", "datasets.0.path=suport.jsonl"),
        (
            "reproduce",
            "haider2024",
            "--only",
            "haider2024/llama-2-7b",
            "--rehearse",
            "--set",
            "datasets.0.path=suport.jsonl",
        ),
        ("new", "other", "--data", "suport.jsonl"),
        ("score", "suport.jsonl"),
    ],
    ids=" ".join,
)
def test_a_missing_file_is_an_error_of_a_command_that_reads_it_with_the_nearest_name(recipe, moved, words):
    done = recipe.fails(*words)
    assert "; did you mean support.jsonl?" in done.stdout + done.stderr
    assert not [*moved.rglob("run.json"), *moved.glob("variants/*")]


MISSING = (
    "suport.jsonl does not exist; did you mean support.jsonl?; correct the path, put the file there, or pass other "
    "rows with `recipe new --data FILE`; only data_files of a folder can be a pattern"
)


@pytest.mark.parametrize(
    "words",
    [
        ("check", "mine.yaml"),
        ("check", "mine.yaml", "--rehearse"),
        ("run", "mine.yaml", "--dry-run"),
        ("run", "mine.yaml", "--rehearse", "--dry-run"),
        ("sweep", "mine.yaml", "--set", "lora_r=8,16", "--dry-run"),
        ("new", "other", "--from", "mine.yaml"),
    ],
    ids=" ".join,
)
def test_a_missing_data_file_is_a_warning_of_a_command_that_reads_no_rows(recipe, moved, words):
    done = recipe.ok(*words)
    message = f"mine.yaml:24: warning: datasets.0.path: {MISSING} [missing-file:datasets.0.path]"
    assert message in (done.stdout + done.stderr).splitlines()


def test_a_missing_data_file_is_a_note_of_a_plan(moved, monkeypatch):
    monkeypatch.chdir(moved)
    planned = plan.plan_request(Request(str(moved / "mine.yaml")))
    assert f"missing-file:datasets.0.path: {MISSING}" in planned.notes


def test_a_missing_file_of_evaluation_rows_has_the_nearest_name(recipe, run, moved):
    done = recipe.fails("evaluate", run.path, "--adapter", "none", "--data", "suport.jsonl")
    assert "suport.jsonl: does not exist; did you mean support.jsonl?" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"deepspeed": "zero3.json"},
        {"lora_model_dir": "./adapter"},
        {"resume_from_checkpoint": "outputs/checkpoint-3"},
        {"datasets": [{"path": "support.jsonl", "type": "alpaca"}, {"path": "gone.jsonl", "type": "alpaca"}]},
        {"datasets": [{"path": "./rows", "type": "alpaca"}]},
        {"datasets": [{"path": "my/rows/2026", "type": "alpaca"}]},
        {"test_datasets": [{"path": "gone.jsonl", "type": "alpaca"}]},
    ],
    ids=str,
)
def test_a_rehearsal_replaces_no_missing_file(recipe, moved, change):
    config = yamlfiles.read_yaml(moved / "mine.yaml")
    config["datasets"][0]["path"] = "support.jsonl"
    (moved / "mine.yaml").write_text(yamlfiles.write_yaml(config | change))
    for option in ((), ("--rehearse",)):
        done = recipe("check", "mine.yaml", *option)
        assert done.stdout.count("[missing-file:") == 1, done.stdout


def test_rows_that_are_not_prepared_yet_are_replaced_in_a_rehearsal(recipe, tmp_path):
    recipe.ok("check", LLAMA_2, "--rehearse")
    recipe.ok("run", LLAMA_2, "--dry-run")
    assert plan.composed_for(Request(LLAMA_2), None).recipe == LLAMA_2


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        ("rows/trian.jsonl", "; did you mean rows/train.jsonl?"),
        ("rows/Train.jsonl", "; did you mean rows/train.jsonl?"),
        ("rows/vald.jsonl", ""),
        ("a/b/c.jsonl", ""),
        ("rows/x", ""),
        ("broken.jsonl", ""),
    ],
)
def test_a_similar_name_is_one_of_the_folder(place, missing, hint):
    (place / "rows").mkdir()
    for name in ("rows/train.jsonl", "valid.jsonl"):
        (place / name).write_text(ROWS)
    (place / "broken.jsonl").symlink_to("nowhere")
    assert absence(Path(missing)) == f"does not exist{hint}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("show fifo.yaml", "fifo.yaml: is not a regular file"),
        ("show folder.yaml", "folder.yaml: is a folder"),
        ("score fifo.jsonl", "fifo.jsonl: is not a regular file"),
        ("score folder.jsonl", "folder.jsonl: is a folder"),
        ("new other --data fifo.jsonl", "--data fifo.jsonl: is not a regular file"),
        ("new other --data folder.jsonl", "--data folder.jsonl: is a folder"),
        (
            "check mine.yaml --all-rows",
            "mine.yaml:24: error: datasets.0.path: fifo.jsonl is not a regular file; correct the path",
        ),
        ("run mine.yaml --rehearse", "datasets.0.path: fifo.jsonl is not a regular file; correct the path"),
        ("check mine.yaml --set deepspeed=fifo.json", "deepspeed: fifo.json is not a regular file; correct the path"),
        ("check mine.yaml --set deepspeed=/dev/zero", "deepspeed: /dev/zero is not a regular file; correct the path"),
        (
            "check mine.yaml --set base_model=./fifo.json",
            "base_model: ./fifo.json is not a regular file; give a folder",
        ),
    ],
)
def test_a_fifo_or_folder_is_not_a_missing_file(recipe, moved, words, message):
    for suffix in ("yaml", "json", "jsonl"):
        os.mkfifo(moved / f"fifo.{suffix}")
        (moved / f"folder.{suffix}").mkdir()
    config = moved / "mine.yaml"
    config.write_text(config.read_text().replace("suport", "fifo"))
    done = recipe.fails(*words.split())
    assert message in done.stdout + done.stderr
