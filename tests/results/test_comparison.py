"""`recipe results --compare` of runs, from folders as runs leave them."""

from pathlib import Path
from typing import Any

import orjson
from conftest import Recipe
from run_folders import ADAPTER, a_run

from qlora_recipes.base.files import write_rows
from qlora_recipes.runs.rundir import RunDir

LLAMA_2 = "haider2024/llama-2-7b"
PREDICTIONS = [{"row": n, "reference": f"rename {n} please", "prediction": f"rename {n}", "idx": n} for n in range(4)]


def trained(runs: Path, name: str, rate: float, steps: int = 6, **more: Any) -> RunDir:
    """A run whose learning rate shows from the second step's loss on."""
    run = a_run(runs, LLAMA_2, name, 5.0, set={"learning_rate": rate}, **more)
    write_rows(run.metrics, ({"step": n, "loss": 2.0 / n + (rate if n > 1 else 0)} for n in range(1, steps + 1)))
    run.output.mkdir()
    (run.output / ADAPTER).write_text(str(rate))
    return run


def test_runs_that_are_not_evaluated_are_compared_by_their_trainings(recipe: Recipe, tmp_path: Path) -> None:
    for name, rate in (("one", 2e-4), ("two", 2e-4), ("other", 3e-4)):
        trained(tmp_path / "runs", name, rate)
    same = orjson.loads(recipe("results", "--compare", "one", "two", "--json").stdout)
    assert same == {
        "training": {"first": 1, "last": 6, "step": None, "losses": None, "same_adapter": True, "differences": {}},
        "scores": None,
    }
    other = orjson.loads(recipe("results", "--compare", "one", "other", "--json").stdout)["training"]
    assert (other["step"], other["losses"], other["same_adapter"]) == (2, [1.0002, 1.0003], False)
    assert other["differences"] == {"learning_rate": [2e-4, 3e-4]}
    shown = recipe("results", "--compare", "one", "other")
    assert shown.returncode == 0 and "learning_rate: 0.0002 -> 0.0003" in shown.stdout.splitlines()


def test_both_parts_are_shown_where_both_are_there(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(trained(tmp_path / "runs", name, 2e-4).path / "predictions.jsonl", PREDICTIONS)
    as_json = orjson.loads(recipe("results", "--compare", "one", "two", "--json").stdout)
    assert as_json["training"]["same_adapter"] is True
    assert "bleu4" in {row["score"] for row in as_json["scores"]}
    csv = recipe("results", "--compare", "one", "two", "--csv")
    several = recipe("results", "--compare", "one", "two", "--metric", "rouge_l")
    assert csv.stdout.startswith("score,")
    assert ["not corrected" in done.stderr for done in (csv, several)] == [False, True]


def test_versions_and_machine_are_among_what_differs(recipe: Recipe, tmp_path: Path) -> None:
    machine = {"packages": {"torch": "2.14.1"}, "python": "3.13", "gpus": [{"name": "T4", "driver": "580"}]}
    trained(tmp_path / "runs", "one", 2e-4, provenance=machine, gpus_used=1)
    newer = machine | {"packages": {"torch": "2.15.0"}, "gpus": [{"name": "T4", "driver": "590"}]}
    trained(tmp_path / "runs", "two", 2e-4, provenance=newer, gpus_used=2)
    shown = orjson.loads(recipe("results", "--compare", "one", "two", "--json").stdout)
    assert shown["training"]["differences"] == {
        "version of torch": ["2.14.1", "2.15.0"],
        "GPUs": ["T4, driver 580", "T4, driver 590"],
        "ranks": [1, 2],
    }


def test_a_run_without_steps_is_compared_by_its_predictions(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = trained(tmp_path / "runs", name, 2e-4)
        write_rows(run.path / "predictions.jsonl", PREDICTIONS)
    run.metrics.unlink()
    compared = orjson.loads(recipe("results", "--compare", "one", "two", "--json").stdout)
    assert compared["training"] is None and compared["scores"]
    (run.path / "predictions.jsonl").unlink()
    assert recipe("results", "--compare", "one", "two").returncode == 2


def test_a_file_has_no_training(recipe: Recipe, tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", "one", 2e-4)
    write_rows(run.path / "predictions.jsonl", PREDICTIONS)
    write_rows(tmp_path / "p.jsonl", PREDICTIONS)
    as_json = orjson.loads(recipe("results", "--compare", "one", "p.jsonl", "--json").stdout)
    assert as_json["training"] is None and as_json["scores"]


def test_a_rehearsal_is_not_compared_with_a_real_run(recipe: Recipe, tmp_path: Path) -> None:
    for name, rehearsal in (("one", True), ("two", False)):
        trained(tmp_path / "runs", name, 2e-4, rehearsal=rehearsal)
    assert recipe("results", "--compare", "one", "two").returncode == 2
