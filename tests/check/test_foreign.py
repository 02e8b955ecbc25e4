"""Nothing that a config names of others' code is run before its user agrees by name."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from conftest import config_with
from evil import Evil

from qlora_recipes.base import yamlfiles
from qlora_recipes.check.rule import Case, rule_findings

EVIL = "a_strangers_module"
NAME = "haider2024/code-llama-7b"


@pytest.fixture
def ran(place: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Path:
    """The file that a stranger's plugin writes once it is imported; mine.yaml lists the plugin."""
    mark = place / "ran"
    (place / f"{EVIL}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Plugin: pass\n")
    rows = [f'{{"instruction": "a", "input": "b{number}", "output": "c"}}\n' for number in range(4000)]
    (place / "rows.jsonl").write_text("".join(rows))
    monkeypatch.syspath_prepend(str(place))
    data = {"path": "rows.jsonl", "type": "alpaca"}
    change: dict[str, Any] = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None}
    change |= {"datasets": [data], "test_datasets": None, "val_set_size": 0.1, "plugins": [f"{EVIL}.Plugin"]}
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(config_with(change)))
    return mark


UNREADABLE = ("pandas", "webdataset", "sql", "spark", "./rows", "rows.py")


def levels_by_name(change: dict[str, Any]) -> dict[str, str]:
    cfg = config_with({"revision_of_model": None} | change)
    return {one.name: one.level for one in rule_findings(Case(cfg, cfg, set())) if one.scope == "code"}


ROWS = {"path": "owner/rows", "type": "alpaca"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"trust_remote_code": True}, "foreign-code:trust_remote_code"),
        ({"trust_remote_code": 1}, "foreign-code:trust_remote_code"),
        ({"use_kernels": True}, "foreign-code:use_kernels"),
        # its nearest class has neither key
        (
            {"datasets": [{"type": "_synthetic", "length": 1, "trust_remote_code": True}]},
            "foreign-code:datasets.0.trust_remote_code",
        ),
        ({"datasets": [ROWS | {"trust_remote_code": True}]}, "foreign-code:datasets.0.trust_remote_code"),
        (
            {"overrides_of_model_kwargs": {"allow_all_kernels": True}},
            "foreign-code:overrides_of_model_kwargs.allow_all_kernels",
        ),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin", "mine.Plugin"]}, "foreign-code:plugins.1"),
        ({"plugins": ["axolotl_integrations.Plugin"]}, "foreign-code:plugins.0"),
        ({"plugins": ["axolotl.integrations.nemo_gym.NemoGymPlugin"]}, "foreign-code:plugins.0"),
        ({"plugins": "mine.Plugin"}, "foreign-code:plugins"),
        ({"plugins": {"mine.Plugin": None}}, "foreign-code:plugins.mine.Plugin"),
        ({"plugins": {"mine.Plugin": {}}}, "foreign-code:plugins.mine.Plugin"),
        ({"datasets": [ROWS | {"type": "mine.load_rows"}]}, "foreign-code:datasets.0.type"),
        *(({"datasets": [ROWS | {"ds_type": kind}]}, "foreign-code:datasets.0.ds_type") for kind in UNREADABLE),
        ({"test_datasets": [ROWS | {"ds_type": "pandas"}]}, "foreign-code:test_datasets.0.ds_type"),
        ({"trl": {"reward_funcs": ["mine.reward"]}}, "foreign-code:trl.reward_funcs.0"),
        ({"hatchery": {"reward_funcs": ["mine.reward"]}}, "foreign-code:hatchery.reward_funcs.0"),
        ({"trainer_cls": "mine.Trainer"}, "foreign-code:trainer_cls"),
        ({"cls_model_config": "mine.Config"}, "foreign-code:cls_model_config"),
        ({"torchdistx_path": "mine"}, "foreign-code:torchdistx_path"),
        ({"resume_from_checkpoint": "mine"}, "foreign-code:resume_from_checkpoint"),
        ({"eval_causal_lm_metrics": ["mine/metric.py"]}, "foreign-code:eval_causal_lm_metrics.0"),
        ({"deepspeed": {"compile": {"backend": "mine.compile"}}}, "foreign-code:deepspeed.compile.backend"),
        ({"bnb_config_kwargs": {"some_name": "mine.x"}}, "foreign-code:bnb_config_kwargs.some_name"),
        ({"attn_implementation": "someone/kernel"}, "foreign-code:attn_implementation"),
        ({"attn_implementation": "kernels-community/x|someone/kernel"}, "foreign-code:attn_implementation"),
        ({"attn_implementation": f"kernels-community/x@{40 * 'a'}"}, "foreign-code:attn_implementation"),
        *(
            ({section: {key: value}}, f"foreign-code:{section}.{key}")
            for section in ("overrides_of_model_kwargs", "model_kwargs")
            for key, value in (
                ("attn_implementation", "someone/kernel"),
                ("weights_only", False),
                ("use_safetensors", False),
            )
        ),
        (
            {"overrides_of_model_config": {"_attn_implementation": "someone/kernel"}},
            "foreign-code:overrides_of_model_config._attn_implementation",
        ),
        ({"model_config": {"transformers_weights": "x"}}, "foreign-code:model_config.transformers_weights"),
    ],
)
def test_each_key_that_runs_others_code_is_an_error(change, name):
    assert levels_by_name(change) == {name: "error"}


def test_axolotls_own_and_this_projects_are_not_foreign():
    built_in = ["axolotl.integrations.liger.LigerPlugin", "qlora_recipes.plugin.RunPlugin"]
    assert levels_by_name({"plugins": built_in, "trust_remote_code": False, "trl": {"reward_funcs": []}}) == {}
    assert levels_by_name({"attn_implementation": "kernels-community/flash-attn2@v1"}) == {}
    assert levels_by_name({"datasets": [ROWS | {"type": "chatml.intel"}], "rl": "dpo"}) == {}
    assert levels_by_name({"datasets": [ROWS | {"type": "chat_template.argilla"}], "rl": "orpo"}) == {}
    assert (
        levels_by_name({"datasets": [ROWS | {"ds_type": kind} for kind in ("json", "csv", "parquet", "arrow", "text")]})
        == {}
    )
    assert levels_by_name({"datasets": [ROWS | {"train_on_split": "train"}], "trl": {"some_name": "mine.x"}}) == {}
    harmless = {"attn_implementation": "sdpa", "use_safetensors": True, "low_cpu_mem_usage": True}
    rope = {"rope_scaling": {"type": "linear", "factor": 2}}
    assert (
        levels_by_name({"overrides_of_model_kwargs": harmless, "overrides_of_model_config": rope, "use_kernels": False})
        == {}
    )


def test_the_name_of_the_base_model_is_not_code():
    assert levels_by_name({"base_model": "owner/llama", "base_model_config": "owner/llama"}) == {}


def test_a_deepspeed_file_is_read_and_what_is_not_json_is_an_error(place):
    (place / "mine.json").write_text('{"compile": {"backend": "mine.compile"}, "zero_optimization": {"stage": 2}}')
    assert levels_by_name({"deepspeed": "mine.json"}) == {"foreign-code:deepspeed.compile.backend": "error"}
    (place / "mine.json").write_text("{compile: {backend: mine.compile}}")  # Hjson, which DeepSpeed reads
    assert levels_by_name({"deepspeed": "mine.json"}) == {"foreign-code:deepspeed": "error"}


def test_the_format_of_a_folder_is_never_guessed_as_one_that_unpickles():
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    modules = {module for module, _ in _EXTENSION_TO_MODULE.values()}
    assert modules & {"pandas", "sql", "spark", "generator", "cache"} == set()


PICKLED = "pytorch_model.bin"
SAFE = "model.safetensors"


@pytest.mark.parametrize(
    ("files", "safe"),
    [
        ({PICKLED: ""}, False),
        ({PICKLED: "", "extra.safetensors": ""}, False),
        ({PICKLED: "", "adapter_model.safetensors": ""}, False),
        ({PICKLED: "", SAFE: ""}, True),
        ({"training_args.bin": ""}, True),
        ({f"{PICKLED}.index.json": '{"weight_map": {"a": "part.bin"}}'}, False),
        ({f"{SAFE}.index.json": '{"weight_map": {"a": "part.bin"}}', PICKLED: ""}, False),
        ({f"{SAFE}.index.json": '{"weight_map": {"a": "part.safetensors"}, "x": NaN}', PICKLED: ""}, True),
        ({f"{SAFE}.index.json": "[]"}, False),
        (
            {SAFE: "", "config.json": '{"transformers_weights": "adapter_model.bin"}', "adapter_model.bin": ""},
            False,
        ),
        ({SAFE: "", "config.json": "{}", "adapter_config.json": "{}", "adapter_model.bin": ""}, False),
        ({SAFE: "", "other.safetensors.index.json": '{"weight_map": {"a": "part.bin"}}'}, False),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else str(value),
)
def test_a_base_model_is_safe_if_the_loaded_files_are(tmp_path, files, safe):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert levels_by_name({"base_model": str(tmp_path)}) == ({} if safe else {"pickled-weights:base_model": "error"})


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"adapter_model.bin": ""}, "pickled-weights:lora_model_dir"),
        ({"adapter_model.bin": "", "model.safetensors": ""}, "pickled-weights:lora_model_dir"),
        ({"adapter_model.bin": "", "adapter_model.safetensors": ""}, ""),
        ({"adapter_config.json": '{"peft_type": "LORA", "r": 8, "megatron_core": "megatron.core"}'}, ""),
        (
            {"adapter_config.json": '{"megatron_core": "mine"}'},
            "foreign-code:adapter_config.megatron_core",
        ),
        (
            {"adapter_config.json": '{"peft_type": "LORA", "lora_ga_config": {"cache_file": "mine"}}'},
            "foreign-code:adapter_config.lora_ga_config.cache_file",
        ),
        (
            {"adapter_config.json": '{"peft_type": "MULTITASK_PROMPT_TUNING"}'},
            "foreign-code:adapter_config.peft_type",
        ),
    ],
    ids=str,
)
def test_an_adapter_is_safe_if_the_loaded_files_are(tmp_path, files, name):
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    assert levels_by_name({"lora_model_dir": str(tmp_path)}) == ({name: "error"} if name else {})


@pytest.mark.parametrize(
    "words",
    [
        ("check", "mine.yaml", "--all-rows"),
        ("check", "mine.yaml"),
        ("check", "mine.yaml", "--show-tokens", "1"),
        ("plan", "mine.yaml", "--all-rows"),
        ("run", "mine.yaml", "--rehearse"),
        ("sweep", "mine.yaml", "--set", "lora_r=8,16", "--rehearse"),
    ],
)
def test_no_verb_imports_a_strangers_plugin_without_consent(ran, recipe, words):
    done = recipe(*words)
    assert done.returncode in (1, 2)
    assert f"{EVIL}.Plugin" in done.stdout + done.stderr
    assert not ran.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("check", "mine.yaml", "--all-rows"),
        ("check", "mine.yaml", "--show-tokens", "1"),
        ("run", "mine.yaml", "--rehearse"),
    ],
)
def test_no_verb_unpickles_rows_without_consent(ran, recipe, place, words):
    (place / "rows.pkl").write_bytes(pickle.dumps(Evil(ran)))
    rows = {"path": "rows.pkl", "ds_type": "pandas", "type": "alpaca"}
    config = yamlfiles.read_yaml(place / "mine.yaml") | {"plugins": [], "datasets": [rows]}
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(config))
    done = recipe(*words)
    assert done.returncode in (1, 2)
    assert "[foreign-code:datasets.0.ds_type]" in done.stdout + done.stderr
    assert not ran.exists()


def test_consent_leaves_a_warning_and_wrong_names_are_told(ran, recipe):
    agreed = recipe("check", "mine.yaml", "--quick", "--force", "foreign-code:plugins.0")
    assert "error: plugins" not in agreed.stdout
    assert "warning: plugins.0: " in agreed.stdout
    shown = recipe("run", "mine.yaml", "--rehearse", "--dry-run", "--force", "foreign-code:plugins.0")
    assert shown.returncode == 0
    assert "warning: plugins.0: " in shown.stderr
    assert not ran.exists()
    wrong = recipe.fails("check", "mine.yaml", "--force", "foreign-code:plugin.0")
    assert "foreign-code:plugins.0?" in wrong.stderr


def test_foreign_code_does_not_hide_mistakes_that_axolotl_finds(ran, recipe):
    wrong = ("--set", "eval_strategy=epoch", "--set", "evals_per_epoch=2", "--set", "trust_remote_code=true")
    (report,) = recipe.json("check", "mine.yaml", *wrong, code=2)
    errors = [finding["name"] for finding in report["findings"] if finding["level"] == "error"]
    assert errors == ["foreign-code:plugins.0", "foreign-code:trust_remote_code", "axolotl:eval_strategy"]
    assert not ran.exists()


@pytest.mark.parametrize("value", ["yes please", 1])
def test_a_wrong_value_that_would_hide_remote_code_cannot_be_forced(ran, recipe, value):
    words = ("mine.yaml", "--set", f"trust_remote_code={value}", "--force", "foreign-code:plugins.0")
    for command in (("check", *words, "--all-rows"), ("run", *words, "--rehearse")):
        recipe.fails(*command, "--force", "value:trust_remote_code")
    assert not ran.exists()


@pytest.mark.long
def test_with_consent_the_plugin_is_imported(ran, recipe):
    recipe("check", "mine.yaml", "--force", "foreign-code:plugins.0")
    assert ran.exists()
