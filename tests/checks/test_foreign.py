"""Nothing that a config names of others' code is run before its user agrees by name."""

from pathlib import Path
from typing import Any

import pytest
from conftest import config_with

from qlora_recipes.base import yamlfiles
from qlora_recipes.checks.check import rule_findings
from qlora_recipes.checks.finding import Case

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


def found(change: dict[str, Any]) -> dict[str, str]:
    cfg = config_with(change)
    return {one.name: one.level for one in rule_findings(Case(cfg, set())) if one.scope == "code"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"trust_remote_code": True}, "remote-code:trust_remote_code"),
        (
            {"datasets": [{"path": "x", "type": "alpaca", "trust_remote_code": True}]},
            "remote-code:datasets.0.trust_remote_code",
        ),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin", "mine.Plugin"]}, "foreign-code:plugins.1"),
        ({"plugins": ["axolotl_integrations.Plugin"]}, "foreign-code:plugins.0"),
        ({"datasets": [{"path": "x", "type": "mine.load_rows"}]}, "foreign-code:datasets.0.type"),
        ({"trl": {"reward_funcs": ["mine.reward"]}}, "foreign-code:trl.reward_funcs"),
        ({"trainer_cls": "mine.Trainer"}, "foreign-code:trainer_cls"),
        ({"attn_implementation": "someone/kernel"}, "foreign-code:attn_implementation"),
    ],
)
def test_each_key_that_runs_others_code_is_an_error(change, name):
    assert found(change) == {name: "error"}


def test_axolotls_own_and_this_projects_are_not_foreign():
    own = ["axolotl.integrations.liger.LigerPlugin", "qlora_recipes.plugin.RunPlugin"]
    assert found({"plugins": own, "trust_remote_code": False, "trl": {"reward_funcs": []}}) == {}
    assert found({"attn_implementation": "kernels-community/flash-attn2"}) == {}
    assert found({"datasets": [{"path": "x", "type": "chatml.intel"}], "rl": "dpo"}) == {}


@pytest.mark.parametrize("key", ["base_model", "lora_model_dir"])
def test_pickled_weights_are_an_error_unless_there_are_safe_ones(tmp_path, key):
    name = "pytorch_model.bin" if key == "base_model" else "adapter_model.bin"
    (tmp_path / name).touch()
    (tmp_path / "training_args.bin").touch()
    assert found({key: str(tmp_path), "revision_of_model": None}) == {f"pickled-weights:{key}": "error"}
    (tmp_path / "model.safetensors").touch()
    assert found({key: str(tmp_path), "revision_of_model": None}) == {}


@pytest.mark.parametrize(
    "words",
    [
        ("check", "mine.yaml", "--data"),
        ("check", "mine.yaml"),
        ("check", "mine.yaml", "--show-tokens", "1"),
        ("plan", "mine.yaml", "--data"),
        ("run", "mine.yaml", "--rehearse"),
        ("sweep", "mine.yaml", "--set", "lora_r=8,16", "--rehearse"),
    ],
)
def test_no_verb_imports_a_strangers_plugin_without_consent(ran, recipe, words):
    done = recipe(*words)
    assert done.returncode in (1, 2)
    assert f"{EVIL}.Plugin" in done.stdout + done.stderr
    assert not ran.exists()


def test_consent_leaves_a_warning_and_wrong_names_are_told(ran, recipe):
    agreed = recipe("check", "mine.yaml", "--quick", "--force", "foreign-code:plugins.0")
    assert "error: plugins" not in agreed.stdout
    assert "warning: plugins.0: " in agreed.stdout
    shown = recipe("run", "mine.yaml", "--rehearse", "--dry-run", "--force", "foreign-code:plugins.0")
    assert (shown.returncode, "warning: plugins.0: " in shown.stderr) == (0, True)
    assert not ran.exists()
    wrong = recipe.fails("check", "mine.yaml", "--force", "foreign-code:plugin.0")
    assert "foreign-code:plugins.0?" in wrong.stderr


@pytest.mark.parametrize("value", ["yes please", 1])
def test_a_wrong_value_that_would_hide_remote_code_cannot_be_forced(ran, recipe, value):
    words = ("mine.yaml", "--set", f"trust_remote_code={value}", "--force", "foreign-code:plugins.0")
    for verb in (("check", *words, "--data"), ("run", *words, "--rehearse")):
        recipe.fails(*verb, "--force", "value:trust_remote_code")
    assert not ran.exists()


@pytest.mark.long
def test_with_consent_the_plugin_is_imported(ran, recipe):
    recipe("check", "mine.yaml", "--force", "foreign-code:plugins.0")
    assert ran.exists()
