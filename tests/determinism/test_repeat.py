"""Real trainings by Axolotl, made to repeat bit for bit, and what is said where two of them part."""

import subprocess
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe, finish, start

from qlora_recipes.base.files import sha256
from qlora_recipes.determinism import trace
from qlora_recipes.runs.rundir import RunDir

SETTINGS = ["datasets.0.split=train[:16]", "gradient_accumulation_steps=2", "num_epochs=2", "evals_per_epoch=1"]
NAME = "haider2024/llama-2-7b"
CHANGES = {"one": "", "again": "", "other order": "curriculum_sampling=true", "other rate": "learning_rate=3e-4"}


def begun(place: Path, tiny: Path, change: str = "") -> "subprocess.Popen[str]":
    """A rehearsal that has been started."""
    sets = [word for text in (*SETTINGS, f"base_model={tiny}", change) if text for word in ("--set", text)]
    return start(place, "run", NAME, "--rehearse", "--deterministic", *sets)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path, cache: Path) -> dict[str, RunDir]:
    """Two equal rehearsals, one with the rows in another order, and one with another learning rate."""
    place = tmp_path_factory.mktemp("repeat")
    return {name: RunDir(place / finish(begun(place, tiny, change))) for name, change in CHANGES.items()}


def compared(recipe: Recipe, runs: dict[str, RunDir], other: str) -> dict[str, Any]:
    done = recipe("results", "--compare", runs["one"].path, runs[other].path, "--json")
    assert done.returncode == 0, done.stderr
    return orjson.loads(done.stdout)["training"]


def said(recipe: Recipe, runs: dict[str, RunDir], other: str) -> list[str]:
    return recipe("results", "--compare", runs["one"].path, runs[other].path).stdout.splitlines()


@pytest.mark.long
def test_two_trainings_are_equal_to_the_last_bit(recipe: Recipe, runs: dict[str, RunDir]) -> None:
    one, again = runs["one"], runs["again"]
    steps = trace.read(one.path / trace.FILE)
    assert [(step.step, step.epoch) for step in steps] == [(n, (n - 1) // 4) for n in range(1, 9)]
    assert steps == trace.read(again.path / trace.FILE)
    for file in ("adapter_model.safetensors", "adapter_config.json", "checkpoint-8/optimizer.pt"):
        assert sha256(one.output / file) == sha256(again.output / file), file
    made = compared(recipe, runs, "again")
    assert (made["step"], made["last"], made["same_adapter"], made["differences"]) == (None, 8, True, {})
    assert made["deterministic"] is True


@pytest.mark.long
def test_the_settings_hold_in_the_process_that_trains(runs: dict[str, RunDir]) -> None:
    for run in runs.values():
        assert "full_determinism" in {difference.key for difference in run.read().differences}
        first = next(record for record in map(orjson.loads, run.metrics.read_bytes().splitlines()) if "step" in record)
        assert first["deterministic"] == {
            "torch deterministic algorithms": True,
            "torch only warns where there is none": False,
            "torch inductor deterministic": True,
            "cudnn deterministic": True,
            "cudnn benchmark": False,
            "CUBLAS_WORKSPACE_CONFIG": ":16:8",
            "FLASH_ATTENTION_DETERMINISTIC": "1",
            "order of sets is random": False,
        }


@pytest.mark.long
def test_the_trace_has_what_the_trainer_logged(runs: dict[str, RunDir]) -> None:
    logged = [record for record in runs["one"].read_metrics() if "loss" in record]
    steps = trace.read(runs["one"].path / trace.FILE)
    assert [step.loss for step in steps] == pytest.approx([record["loss"] for record in logged], rel=1e-6)
    assert [step.grad_norm for step in steps] == [record["grad_norm"] for record in logged]
    assert [step.learning_rate for step in steps] == [record["learning_rate"] for record in logged]
    assert len({step.batch for step in steps}) == 8
    sums = [sum(int(step.rows, 16) for step in steps if step.epoch == epoch) % 2**48 for epoch in (0, 1)]
    assert sums[0] == sums[1]  # both epochs have the same rows


@pytest.mark.long
def test_another_order_of_rows_is_found(recipe: Recipe, runs: dict[str, RunDir]) -> None:
    made = compared(recipe, runs, "other order")
    assert (made["step"], made["what"], made["same_adapter"]) == (1, "order", False)
    assert list(made["differences"]) == ["curriculum_sampling"]
    _, first, *_, last = filter(None, said(recipe, runs, "other order"))
    assert first == "Step 1: the rows are in another order; over the epoch they are the same."
    assert last == "curriculum_sampling: None -> True"


@pytest.mark.long
def test_another_learning_rate_is_found(recipe: Recipe, runs: dict[str, RunDir]) -> None:
    made = compared(recipe, runs, "other rate")
    assert (made["step"], made["what"], made["values"]) == (1, "learning rate", [2e-4, 3e-4])
    assert (made["loss_from"], made["same_adapter"]) == (2, False)
    assert made["differences"] == {"learning_rate": [2e-4, 3e-4]}
    assert "The losses differ from step 2 on." in said(recipe, runs, "other rate")


@pytest.mark.long
def test_a_resumed_training_has_the_trace_of_an_undisturbed_one(
    recipe: Recipe, runs: dict[str, RunDir], tiny: Path, tmp_path: Path
) -> None:
    process = begun(tmp_path, tiny)
    while not any('"step":0' in file.read_text() for file in tmp_path.glob("runs/*/*/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()  # it ends after the next step, with a checkpoint
    finish(process, code=1)
    runs["resumed"] = RunDir(next(tmp_path.glob("runs/*/*/*")))
    done = len(trace.read(runs["resumed"].path / trace.FILE))
    assert 1 <= done < 8
    finish(start(tmp_path, "resume", "latest"))
    made = compared(recipe, runs, "resumed")
    assert (made["step"], made["last"], made["same_adapter"]) == (None, 8, True)
    assert made["differences"] == {"resumed from": [None, f"checkpoint-{done}"]}
