"""Real trainings by Axolotl, made to repeat bit for bit, and where the losses of two of them diverge."""

import subprocess
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe, finish, start

from qlora_recipes.base.files import sha256
from qlora_recipes.runs.rundir import RunDir

SETTINGS = ["datasets.0.split=train[:16]", "gradient_accumulation_steps=2", "num_epochs=2", "evals_per_epoch=1"]
NAME = "haider2024/llama-2-7b"
CHANGES = {"one": "", "again": "", "other order": "curriculum_sampling=true", "other rate": "learning_rate=3e-4"}


def begun(place: Path, tiny: Path, change: str = "") -> "subprocess.Popen[str]":
    """A rehearsal that has been started."""
    sets = [word for text in (*SETTINGS, f"base_model={tiny}", change) if text for word in ("--set", text)]
    return start(place, "run", NAME, "--rehearse", "--profile", "deterministic", *sets)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path, cache: Path) -> dict[str, RunDir]:
    """Two equal rehearsals, one with the rows in another order, and one with another learning rate."""
    place = tmp_path_factory.mktemp("repeat")
    return {name: RunDir(place / finish(begun(place, tiny, change))) for name, change in CHANGES.items()}


def compared(recipe: Recipe, runs: dict[str, RunDir], other: str) -> dict[str, Any]:
    done = recipe("results", "--compare", runs["one"].path, runs[other].path, "--json")
    assert done.returncode == 0, done.stderr
    return orjson.loads(done.stdout)["training"]


def losses(run: RunDir) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(record["loss"], record["grad_norm"]) for record in run.read_metrics() if "loss" in record]


@pytest.mark.long
def test_two_trainings_are_equal_to_the_last_bit(recipe: Recipe, runs: dict[str, RunDir]) -> None:
    one, again = runs["one"], runs["again"]
    assert len(losses(one)) == 8
    assert losses(one) == losses(again)
    for file in ("adapter_model.safetensors", "adapter_config.json", "checkpoint-8/optimizer.pt"):
        assert sha256(one.output / file) == sha256(again.output / file), file
    made = compared(recipe, runs, "again")
    assert (made["step"], made["last"], made["same_adapter"], made["differences"]) == (None, 8, True, {})


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
@pytest.mark.parametrize(
    ("other", "step", "key"), [("other order", 1, "curriculum_sampling"), ("other rate", 2, "learning_rate")]
)
def test_the_first_loss_that_differs_is_found(
    recipe: Recipe, runs: dict[str, RunDir], other: str, step: int, key: str
) -> None:
    made = compared(recipe, runs, other)
    assert (made["step"], made["same_adapter"], list(made["differences"])) == (step, False, [key])


@pytest.mark.long
def test_a_resumed_training_has_the_losses_of_an_undisturbed_one(
    recipe: Recipe, runs: dict[str, RunDir], tiny: Path, tmp_path: Path
) -> None:
    process = begun(tmp_path, tiny)
    while not any('"step":0' in file.read_text() for file in tmp_path.glob("runs/*/*/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()  # it ends after the next step, with a checkpoint
    finish(process, code=1)
    runs["resumed"] = RunDir(next(tmp_path.glob("runs/*/*/*")))
    done = len(losses(runs["resumed"]))
    assert 1 <= done < 8
    finish(start(tmp_path, "resume", "latest"))
    made = compared(recipe, runs, "resumed")
    assert (made["step"], made["last"], made["same_adapter"]) == (None, 8, True)
    assert made["differences"] == {"resumed from": [None, f"checkpoint-{done}"]}
