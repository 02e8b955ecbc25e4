"""Room on disks before a run: what it will write, against what is free."""

from pathlib import Path
from typing import Any

import pytest
from conftest import config_with

from qlora_recipes.checks import model_rules
from qlora_recipes.checks.check import rule_findings
from qlora_recipes.checks.finding import Case, Finding

NAME = "haider2024/code-llama-7b"


def case_of(change: dict[str, Any], launching: bool = False) -> Case:
    return Case(config_with({"datasets": None, "test_datasets": None} | change, NAME), set(), launching=launching)


@pytest.mark.parametrize(
    ("change", "parameters"),
    [
        ({}, 6_738_415_616),
        ({"base_model": "meta-llama/Meta-Llama-3-8B", "revision_of_model": None}, 8_030_261_248),
        ({"base_model": "microsoft/Phi-3-mini-4k-instruct", "revision_of_model": None}, 3_821_079_552),
        ({"base_model": "some/model"}, 0),
    ],
)
def test_the_parameters_of_a_model(change: dict[str, Any], parameters: int) -> None:
    assert model_rules._parameters(case_of(change).architecture) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("launching", "there", "adapter", "expected"),
    [
        (False, False, None, [("warning", "output_dir", "27 GB")]),
        (True, True, None, [("error", "output_dir", "27 GB")]),
        (True, False, "qlora", [("error", "base_model", "13 GB")]),
    ],
)
def test_too_little_room_is_a_finding(
    monkeypatch: pytest.MonkeyPatch,
    launching: bool,
    there: bool,
    adapter: str | None,
    expected: list[tuple[str, str, str]],
) -> None:
    def found() -> list[Finding]:
        case = case_of({"adapter": adapter}, launching)
        case.model.weights_here = there
        return [finding for finding in rule_findings(case) if finding.rule == "no-room"]

    monkeypatch.setattr("qlora_recipes.checks.model_rules.free_bytes", lambda _: 10**8)
    assert [(one.level, one.key, one.problem.rpartition(", ")[2]) for one in found()] == expected
    assert (str(Path("runs").absolute()) in found()[0].problem) is not adapter and "0.1 GB" in found()[0].problem
    monkeypatch.setattr("qlora_recipes.checks.model_rules.free_bytes", lambda _: 10**12)
    assert found() == []
