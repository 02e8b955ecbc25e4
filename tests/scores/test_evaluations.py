"""What is shown of an evaluation's predictions."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe
from run_folders import a_run

from qlora_recipes.base.files import write_rows
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import evaluate
from qlora_recipes.scores.evaluations import Evaluation, read_predictions, read_scores
from qlora_recipes.scores.predict import as_row

LONG = "Why not " + "reuse the pool here, as the other callers do, " * 20


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was evaluated on three rows."""
    folder: RunDir = a_run(tmp_path / "runs", "haider2024/llama-2-7b", "20260101-000000-a", 5.0)
    texts = ["Reuse it.", "", "x"]
    rows = ({"row": i, "reference": LONG if i == 1 else "short", "prediction": text} for i, text in enumerate(texts))
    write_rows(folder.path / "predictions.jsonl", rows)
    return folder


def evaluation(folder: Path) -> Evaluation:
    made = read_scores(folder)
    assert made
    return made


def test_evaluate_shows_the_first_two_wrapped_and_cut(
    run: RunDir, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an evaluation that is complete, as these rows are made up."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: evaluation(run.path))
    monkeypatch.setenv("COLUMNS", "60")
    done = recipe("evaluate", "latest")
    assert done.returncode == 0
    shown, empty, scores = done.stdout.split("\n\n")
    assert shown == "row 1\nreference   short\nprediction  Reuse it."
    assert empty.startswith("row 2\n") and empty.endswith("[...]\nprediction  (nothing)")
    assert len(empty.splitlines()) == 8  # six of them the reference's
    assert all(len(line) <= 60 for line in empty.splitlines())
    assert scores.startswith("rows ")
    assert "row 1" not in recipe("evaluate", "latest", "--json").stdout


@pytest.mark.parametrize("idx", [True, 3, "a", 1.5, None, [3]])
def test_whatever_data_has_for_a_position_predictions_can_be_read(tmp_path: Path, idx: Any) -> None:
    row = as_row(0, {"idx": idx, "lang": idx}, "a = 1") | {"prediction": "a = 2"}
    write_rows(tmp_path / "predictions.jsonl", [row])
    assert read_predictions(tmp_path) == [row]
    assert row.get("idx") == (idx if idx in (3, "a") else None)
