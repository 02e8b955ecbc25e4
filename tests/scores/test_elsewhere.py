import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe
from run_folders import a_run, a_tiny_run

from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores.evaluations import read_scores

Rows = list[dict[str, Any]]
ON_BASE = ("--adapter", "none", "--bertscore", "none")


@pytest.fixture
def run(tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path) -> RunDir:
    """A finished run of the tiny Llama as far as an evaluation of its base model needs one."""
    return a_tiny_run(tmp_path, tiny, tiny_profile, sample)


@pytest.fixture
def file(run: RunDir, recipe: Recipe, tmp_path: Path) -> Path:
    """The prompts of its test rows, each with a prediction, in another order and without the texts of the prompts."""
    done = recipe("evaluate", run.path, "--adapter", "none", "--export-prompts", tmp_path / "p.jsonl")
    assert "--predictions" in done.stderr
    rows = read(tmp_path / "p.jsonl")
    kept = [{key: row[key] for key in ("row", "prompt_sha256")} | {"prediction": row["reference"]} for row in rows]
    random.Random(0).shuffle(kept)
    return write(tmp_path / "p.jsonl", kept)


def read(file: Path) -> Rows:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def write(file: Path, rows: Rows) -> Path:
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return file


def test_predictions_made_elsewhere_become_the_evaluation_and_are_marked(
    run: RunDir, file: Path, recipe: Recipe, sample: Path
) -> None:
    done = recipe("evaluate", run.path, *ON_BASE, "--predictions", file)
    assert done.returncode == 0, done.stderr
    assert "the predictions were made elsewhere, from the run's prompts" in done.stderr
    where = run.path / "evaluations" / "base-model"
    evaluation = read_scores(where)
    assert evaluation and evaluation.settings.engine == "elsewhere" and evaluation.settings.predictions_sha256
    assert evaluation.scores["exact"] == 1
    rows = read(where / "predictions.jsonl")
    assert [row["row"] for row in rows] == list(range(len(read(sample / "test.jsonl"))))
    assert all(row["prediction"] == row["reference"] for row in rows)

    again = recipe("evaluate", run.path, *ON_BASE)  # not generated a second time, here
    assert "complete, made elsewhere" in again.stderr
    write(file, [row | {"prediction": "other"} for row in read(file)])
    changed = recipe("evaluate", run.path, *ON_BASE, "--predictions", file)
    assert changed.returncode == 0 and "complete" not in changed.stderr
    evaluation = read_scores(where)
    assert evaluation and evaluation.scores["exact"] == 0


def test_predictions_of_this_projects_own_are_not_lost_to_others(run: RunDir, file: Path, recipe: Recipe) -> None:
    assert recipe("evaluate", run.path, *ON_BASE, "--predictions", file).returncode == 0
    scores = run.path / "evaluations" / "base-model" / "scores.json"
    scores.write_text(scores.read_text().replace('"elsewhere"', '"transformers"'))
    before = scores.read_bytes()
    write(file, [row | {"prediction": "other"} for row in read(file)])
    refused = recipe("evaluate", run.path, *ON_BASE, "--predictions", file)
    assert refused.returncode == 2 and "generated here" in refused.stderr
    assert scores.read_bytes() == before


def _first(change: dict[str, Any]) -> Callable[[Rows], Rows]:
    return lambda rows: [row | change if row["row"] == 0 else row for row in rows]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_first({"prompt_sha256": "0" * 64}), "row 0 was made from another prompt than the run's"),
        (_first({"prediction": None}), "prediction"),
        (_first({"row": 1}), "has the row 1, as another line"),
        (_first({"row": None}), "has no whole number as its row (None)"),
        (_first({"row": 999}), "has row 999, and"),
        (lambda rows: rows[1:], "is missing; add it, or evaluate the first rows alone with --limit"),
        (lambda rows: [{k: v for k, v in row.items() if k != "prompt_sha256"} for row in rows], "prompt_sha256"),
        (lambda rows: [], "has no rows"),
    ],
)
def test_a_file_of_other_prompts_or_with_gaps_is_refused(
    run: RunDir, file: Path, recipe: Recipe, damage: Callable[[Rows], Rows], says: str
) -> None:
    write(file, damage(read(file)))
    refused = recipe("evaluate", run.path, *ON_BASE, "--predictions", file)
    assert refused.returncode == 2 and says in refused.stderr
    assert not (run.path / "evaluations" / "base-model" / "scores.json").exists()


def test_a_run_with_such_predictions_is_marked_in_the_list(tmp_path: Path, recipe: Recipe) -> None:
    a_run(tmp_path / "runs", "haider2024/llama-2-7b", "one", 5.0, settings={"engine": "elsewhere"})
    a_run(tmp_path / "runs", "haider2024/llama-2-7b", "two", 5.0)
    assert recipe("results", "--md").stdout.count("made elsewhere") == 1
    shutil.rmtree(tmp_path / "runs" / "haider2024/llama-2-7b/two")
    said = recipe("results", "--study", "haider2024").stdout
    assert "haider2024/llama-2-7b: its predictions were made elsewhere; by what is as their maker says." in said


def test_a_file_that_is_not_there_is_refused(run: RunDir, recipe: Recipe) -> None:
    refused = recipe("evaluate", run.path, *ON_BASE, "--predictions", "nowhere.jsonl")
    assert refused.returncode == 2 and "nowhere.jsonl: no such file" in refused.stderr
