"""Room on disks before a run: what it will write, against what is free."""

from pathlib import Path
from typing import Any

import pytest
from conftest import config_with

from qlora_recipes.checks import model_rules
from qlora_recipes.checks.check import rule_findings
from qlora_recipes.checks.finding import Case, Finding

NAME = "haider2024/code-llama-7b"
ADAPTER = 33_554_432  # parameters of rank 32 on the attention of Code Llama 7B


def case_of(change: dict[str, Any], launching: bool = False) -> Case:
    return Case(config_with({"datasets": None, "test_datasets": None} | change, NAME), set(), launching=launching)


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({}, ADAPTER),
        ({"lora_modules_to_save": ["lm_head"]}, ADAPTER + 32016 * 4096),
        ({"lora_target_modules": ".*self_attn.*"}, 0),
        ({"peft_layers_to_transform": [0]}, 0),
        ({"lora_target_modules": ".*self_attn.*", "lora_target_linear": True}, 79_953_920),
        ({"adapter": None, "lora_r": None}, 6_738_415_616),
        ({"base_model": "some/model"}, 0),
    ],
)
def test_parameters_that_are_surely_trained(change: dict[str, Any], trained: int) -> None:
    assert model_rules._parameters(case_of(change))[1] == pytest.approx(trained, rel=1e-3)


@pytest.mark.parametrize(
    ("launching", "there", "expected"),
    [
        (False, False, [("warning", "output_dir", "0.27 GB")]),
        (True, True, [("error", "output_dir", "0.27 GB")]),
        (True, False, [("error", "output_dir", "0.27 GB"), ("error", "base_model", "13 GB")]),
    ],
)
def test_too_little_room_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, launching: bool, there: bool, expected: list[tuple[str, str, str]]
) -> None:
    def found() -> list[Finding]:
        case = case_of({}, launching)
        case.model.weights_here = there
        return [finding for finding in rule_findings(case) if finding.rule == "no-room"]

    monkeypatch.setattr("qlora_recipes.checks.model_rules.free_bytes", lambda _: 10**8)
    assert [(one.level, one.key, one.problem.rpartition(", ")[2]) for one in found()] == expected
    assert str(Path("runs").absolute()) in found()[0].problem and "0.1 GB" in found()[0].problem
    monkeypatch.setattr("qlora_recipes.checks.model_rules.free_bytes", lambda _: 10**12)
    assert found() == []
