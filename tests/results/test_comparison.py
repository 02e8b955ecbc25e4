"""`recipe results --compare` of runs, from folders as runs leave them."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe
from run_folders import ADAPTER, a_run

from qlora_recipes.base.files import write_rows
from qlora_recipes.runs.rundir import RunDir

LLAMA_2 = "haider2024/llama-2-7b"
PREDICTIONS = [{"row": n, "reference": f"rename {n} please", "prediction": f"rename {n}", "idx": n} for n in range(4)]


def traced(runs: Path, name: str, rate: float, steps: int = 6, **more: Any) -> RunDir:
    """A run with a trace, whose learning rate shows from the second step's loss on."""
    run = a_run(runs, LLAMA_2, name, 5.0, set={"learning_rate": rate}, **more)
    write_rows(
        run.path / "trace.jsonl",
        (
            {"step": n, "epoch": 0, "batch": f"{n:012x}", "rows": f"{n:012x}", "grad_norm": 0.5, "learning_rate": rate}
            | {"loss": 2.0 / n + (rate if n > 1 else 0)}
            for n in range(1, steps + 1)
        ),
    )
    run.output.mkdir()
    (run.output / ADAPTER).write_text(str(rate))
    return run


def test_runs_that_are_not_evaluated_are_compared_by_their_trainings(recipe: Recipe, tmp_path: Path) -> None:
    runs = [traced(tmp_path / "runs", name, rate) for name, rate in (("one", 2e-4), ("two", 2e-4), ("other", 3e-4))]
    same = recipe("results", "--compare", "one", "two")
    assert same.returncode == 0, same.stderr
    assert same.stdout.splitlines()[:2] == [
        "Trainings, a: one, b: two",
        "Bit-equal over the 6 steps that both have recorded, 1 to 6, and the adapters are equal.",
    ]
    assert f"`recipe evaluate {runs[0].path.relative_to(tmp_path)}` comes first" in same.stderr
    other = recipe("results", "--compare", "one", "other")
    assert other.stdout.splitlines()[1:5] == [
        "Step 1: the learning rate differs by 0.0001, 0.0002 in a and 0.0003 in b; rows, loss and gradient norm are "
        "the same, so its update differs.",
        "The losses differ from step 2 on.",
        "What differs between them, by their records:",
        "learning_rate: 0.0002 -> 0.0003",
    ]
    as_json = orjson.loads(recipe("results", "--compare", "one", "other", "--json").stdout)
    assert as_json["scores"] is None
    parted = as_json["training"]
    assert (parted["step"], parted["what"], parted["loss_from"], parted["same_adapter"]) == (
        *(1, "learning rate", 2),
        False,
    )


def test_both_parts_are_shown_where_both_are_there(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(traced(tmp_path / "runs", name, 2e-4).path / "predictions.jsonl", PREDICTIONS)
    both = recipe("results", "--compare", "one", "two")
    assert "\nBit-equal over" in both.stdout and "\na: one, b: two" in both.stdout
    assert "not evaluated" not in both.stderr
    as_json = orjson.loads(recipe("results", "--compare", "one", "two", "--json").stdout)
    assert as_json["training"]["same_adapter"] is True
    assert "bleu4" in {row["score"] for row in as_json["scores"]}
    csv = recipe("results", "--compare", "one", "two", "--csv")
    assert csv.stdout.startswith("score,") and "Bit-equal over" in csv.stderr
    several = recipe("results", "--compare", "one", "two", "--metric", "rouge_l")
    assert ["not corrected" in done.stderr for done in (both, several)] == [False, True]


def test_versions_and_machine_are_among_what_differs(recipe: Recipe, tmp_path: Path) -> None:
    machine = {"packages": {"torch": "2.14.1"}, "python": "3.13", "gpus": [{"name": "T4", "driver": "580"}]}
    traced(tmp_path / "runs", "one", 2e-4, provenance=machine, gpus_used=1)
    newer = machine | {"packages": {"torch": "2.15.0"}, "gpus": [{"name": "T4", "driver": "590"}]}
    traced(tmp_path / "runs", "two", 2e-4, provenance=newer, gpus_used=2)
    shown = recipe("results", "--compare", "one", "two").stdout.splitlines()
    assert shown[3:6] == [
        "version of torch: 2.14.1 -> 2.15.0",
        "GPUs: T4, driver 580 -> T4, driver 590",
        "ranks: 1 -> 2",
    ]


def test_a_run_without_a_trace_says_so(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = traced(tmp_path / "runs", name, 2e-4)
        write_rows(run.path / "predictions.jsonl", PREDICTIONS)
    (run.path / "trace.jsonl").unlink()
    compared = recipe("results", "--compare", "one", "two")
    assert compared.returncode == 0 and compared.stdout.startswith("a: one, b: two")
    assert f"is not known: {run.path.relative_to(tmp_path)}: an earlier version made it" in compared.stderr
    (run.path / "predictions.jsonl").unlink()
    nothing = recipe("results", "--compare", "one", "two")
    assert nothing.returncode == 2 and "not evaluated" in nothing.stderr


def test_a_file_has_no_training(recipe: Recipe, tmp_path: Path) -> None:
    run = traced(tmp_path / "runs", "one", 2e-4)
    write_rows(run.path / "predictions.jsonl", PREDICTIONS)
    write_rows(tmp_path / "p.jsonl", PREDICTIONS)
    as_json = orjson.loads(recipe("results", "--compare", "one", "p.jsonl", "--json").stdout)
    assert as_json["training"] is None and as_json["scores"]


@pytest.mark.parametrize("traces", [True, False])
def test_a_rehearsal_is_not_compared_with_a_real_run(recipe: Recipe, tmp_path: Path, traces: bool) -> None:
    for name, rehearsal in (("one", True), ("two", False)):
        run = traced(tmp_path / "runs", name, 2e-4, rehearsal=rehearsal)
        if not traces:
            (run.path / "trace.jsonl").unlink()
    refused = recipe("results", "--compare", "one", "two")
    assert refused.returncode == 2 and "rehearsal, which compares with rehearsals only" in refused.stderr
