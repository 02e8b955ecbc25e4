"""The line that says what one usually does next: each command in it can be run."""

import shlex
from pathlib import Path

import pytest
from conftest import SAMPLE, Recipe
from run_folders import a_run

from qlora_recipes.base import paths
from qlora_recipes.check import check
from qlora_recipes.commands.help import suggest_evaluation

NAME = "haider2024/code-llama-7b"


def next_of(recipe: Recipe, *words: str | Path) -> list[str]:
    """The words of the command that a command says comes next, on stderr; none with --json."""
    done = recipe.ok(*words)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
    assert done.stderr.endswith(f"{said}\n") and "next: " not in done.stdout
    name, *following = shlex.split(said.removeprefix("next: "))
    assert name == "recipe"
    return following


def test_from_a_list_to_a_rehearsal_without_a_gpu_and_data(recipe):
    assert next_of(recipe, "list") == ["run", "start/qlora", "--rehearse"]
    assert next_of(recipe, "new", "my-wide", "--from", NAME, "--set", "lora_r=8") == ["check", "my-wide"]
    laid = ("--set", "lora_dropout=0.1")
    checked = next_of(recipe, "check", "my-wide", "--rehearse", *laid)
    assert checked == ["run", "my-wide", *laid, "--rehearse"]
    recipe.ok(*checked, "--dry-run")


def test_from_prepared_data_to_a_plan(recipe, monkeypatch):
    monkeypatch.setattr(check, "tokenize", lambda *_: None)  # imports Axolotl
    checked = next_of(recipe, "data", "prepare", SAMPLE, "--study", "haider2024")
    assert checked == ["check", "haider2024/llama-2-7b", "--all-rows"]
    assert next_of(recipe, *checked) == ["plan", "haider2024/llama-2-7b"]
    assert next_of(recipe, "check", NAME, "--gpu", "T4") == ["plan", NAME, "--gpu", "T4"]
    assert "next:" not in recipe("check", NAME, "--json").stderr


def test_from_results_to_a_report(recipe, tmp_path):
    a_run(tmp_path / "runs", NAME, "1", 5.0)
    for name in ("latest", "haider2024"):
        assert next_of(recipe, "results", name) == ["report", name]


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_from_an_unfinished_run_to_its_end(recipe, tmp_path, state):
    a_run(tmp_path / "runs", NAME, "1", 5.0, state=state)
    assert next_of(recipe, "results", "latest") == ["resume", "1"]


@pytest.mark.parametrize(
    ("change", "runs", "says"),
    [
        ({}, "other place", "recipe --runs 'other place' evaluate 1-a"),
        ({"test_datasets": [{"path": "a.jsonl", "type": "completion"}]}, "runs", "recipe report 1-a"),
        ({"test_datasets": None}, "runs", "recipe report 1-a"),
    ],
    ids=["answers", "completion", "no rows"],
)
def test_a_run_is_evaluated_next_if_its_rows_have_answers(place, monkeypatch, capsys, change, runs, says):
    folder = a_run(Path(runs), NAME, "1-a", 5.0, set=change)
    monkeypatch.setenv(paths.RUNS, runs)
    suggest_evaluation(folder, "local")
    assert capsys.readouterr().err == f"next: {says}\n"
