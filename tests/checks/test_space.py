"""Room on disks before a run: what it will write, against what is free."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import config_with

from qlora_recipes.checks import model_rules
from qlora_recipes.checks.check import rule_findings
from qlora_recipes.checks.finding import Case, Finding

NAME = "haider2024/code-llama-7b"
DOWNLOAD = "the base model's download"
DATA = {"path": "rows.jsonl", "type": "alpaca"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "rows.jsonl").open("wb") as stream:
        os.truncate(stream.fileno(), 10**8)


def needs(change: dict[str, Any], name: str = NAME, launching: bool = False) -> dict[str, float]:
    """The bytes that a run writes, in GB, by the last word of what they are."""
    case = Case(config_with({"datasets": None, "test_datasets": None} | change, name), set(), launching=launching)
    return {what: size / 1e9 for _, size, what, _ in model_rules._needs(case)}


def test_checkpoints_adapter_and_rows_are_counted() -> None:
    """Code Llama 7B with rank 64 on queries and values trains 33,554,432 parameters; its optimizer is in 32 bits."""
    adapter = 4 * 33_554_432 / 1e9
    assert needs({}) == {
        "the adapter": adapter,
        "checkpoints, 3 of them": pytest.approx(9 * adapter),
    }
    assert needs({"optimizer": "adamw_8bit"})["checkpoints, 3 of them"] == pytest.approx(3 * 1.5 * adapter)
    assert needs({"save_only_model": True})["checkpoints, 3 of them"] == pytest.approx(3 * adapter)
    assert "checkpoints, 1 of them" in needs({"saves_per_epoch": None, "num_epochs": 1})
    assert "checkpoints, 5 of them" in needs({"save_total_limit": None, "num_epochs": 9})
    assert [*needs({"saves_per_epoch": None, "save_strategy": "no"})] == ["the adapter"]
    assert needs({"lora_modules_to_save": ["lm_head"]})["the adapter"] == adapter + 4 * 32016 * 4096 / 1e9
    full = needs({"adapter": None, "lora_r": None})
    assert full["the model"] == pytest.approx(2 * 6.74, rel=0.01)


def test_what_may_not_come_is_not_counted() -> None:
    adapter = 4 * 33_554_432 / 1e9
    for optimizer in ("sgd", "adafactor", "lion_8bit", "galore_adamw"):
        assert needs({"optimizer": optimizer})["checkpoints, 3 of them"] == pytest.approx(3 * adapter)
    assert needs({"lora_target_modules": ".*self_attn.*"}) == {}
    assert needs({"lora_target_linear": False, "peft_layers_to_transform": [0]}) == {}
    assert "the adapter" in needs({"lora_target_modules": ".*self_attn.*", "lora_target_linear": True})


def test_what_is_not_here_is_downloaded_when_a_run_starts() -> None:
    assert needs({}, launching=True)[DOWNLOAD] == pytest.approx(13.48, rel=0.01)
    assert needs({"base_model": "./models/mine"}, launching=True) == {}
    assert needs({"base_model": "some/model"}, launching=True) == {}


@pytest.mark.parametrize(("launching", "level"), [(False, "warning"), (True, "error")])
def test_too_little_room_is_said(monkeypatch: pytest.MonkeyPatch, launching: bool, level: str) -> None:
    def found() -> list[Finding]:
        case = Case(config_with({"datasets": [DATA]}), set(), launching=launching)
        return [finding for finding in rule_findings(case) if finding.rule == "no-room"]

    monkeypatch.setattr("qlora_recipes.checks.model_rules.free_bytes", lambda _: 10**9)
    (only,) = found()
    assert (only.level, only.key, only.scope) == (level, "output_dir", "machine")
    for value in (str(Path("runs").absolute()), "1 GB", "0.13 GB", "1.2 GB"):
        assert value in only.problem
    monkeypatch.setattr("qlora_recipes.checks.model_rules.free_bytes", lambda _: 10**12)
    assert found() == []
