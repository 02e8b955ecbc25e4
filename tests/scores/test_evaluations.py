"""What is shown of an evaluation's predictions."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe
from run_folders import a_run

from qlora_recipes.base.files import write_rows
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import evaluate
from qlora_recipes.scores.evaluations import BASE_MODEL, Evaluation, beside_references, read_predictions, read_scores
from qlora_recipes.scores.predict import as_row

LONG = "Why not " + "reuse the pool here, as the other callers do, " * 20


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was evaluated on three rows, after its base model was."""
    folder: RunDir = a_run(tmp_path / "runs", "haider2024/llama-2-7b", "20260101-000000-a", 5.0)
    (alone := folder.path / "evaluations" / BASE_MODEL).mkdir(parents=True)
    made = orjson.loads((folder.path / "scores.json").read_bytes())
    made["settings"] |= {"adapter": "none", "adapter_sha256": None}
    (alone / "scores.json").write_bytes(orjson.dumps(made))
    for where, texts in ((folder.path, ["Reuse it.", "", "x"]), (alone, ["....", LONG, "y"])):
        rows = ({"row": i, "reference": f"reference {i}", "prediction": text} for i, text in enumerate(texts))
        write_rows(where / "predictions.jsonl", rows)
    return folder


def evaluation(folder: Path) -> Evaluation:
    made = read_scores(folder)
    assert made
    return made


def test_predictions_stand_beside_their_references_and_the_base_models(run: RunDir) -> None:
    assert beside_references(run.path, evaluation(run.path), 2) == [
        {"row": 0, "reference": "reference 0", "base_model": "....", "prediction": "Reuse it."},
        {"row": 1, "reference": "reference 1", "base_model": LONG, "prediction": ""},
    ]
    alone = run.path / "evaluations" / BASE_MODEL
    (first,) = beside_references(run.path, evaluation(alone), 1)
    assert first == {"row": 0, "reference": "reference 0", "prediction": "...."}


def test_a_base_model_that_was_evaluated_on_other_rows_is_not_set_beside(run: RunDir) -> None:
    alone = run.path / "evaluations" / BASE_MODEL / "scores.json"
    alone.write_text(alone.read_text().replace('"data_sha256":"x"', '"data_sha256":"y"'))
    assert all("base_model" not in row for row in beside_references(run.path, evaluation(run.path), 3))


def test_evaluate_shows_the_first_two_wrapped_and_cut(
    run: RunDir, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an evaluation that is complete, as these rows are made up."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: evaluation(run.path))
    monkeypatch.setenv("COLUMNS", "60")
    done = recipe("evaluate", "latest")
    assert done.returncode == 0
    shown, empty, scores = done.stdout.split("\n\n")
    assert shown == "row 1\nreference   reference 0\nbase model  ....\nprediction  Reuse it."
    assert empty.startswith("row 2\n") and empty.endswith("[...]\nprediction  (nothing)")
    assert len(empty.splitlines()) == 9  # six of them the base model's
    assert all(len(line) <= 60 for line in empty.splitlines())
    assert scores.startswith("rows ")
    assert "row 1" not in recipe("evaluate", "latest", "--json").stdout


@pytest.mark.parametrize("idx", [True, 3, "a", 1.5, None, [3]])
def test_whatever_data_has_for_a_position_predictions_can_be_read(tmp_path: Path, idx: Any) -> None:
    row = as_row(0, {"idx": idx, "lang": idx}, "a = 1") | {"prediction": "a = 2"}
    write_rows(tmp_path / "predictions.jsonl", [row])
    assert read_predictions(tmp_path) == [row]
    assert row.get("idx") == (idx if idx in (3, "a") else None)
