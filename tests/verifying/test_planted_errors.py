"""`recipe verify` for real on this CPU, where all passes, and errors planted in what it measures."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import finish, start

from qlora_recipes.data.verified import Record, judge
from qlora_recipes.planning import steps
from qlora_recipes.planning.traces import Step
from qlora_recipes.running import run
from qlora_recipes.runs import checkpoints
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.verifying import bench, jobs, numerics, trainings
from qlora_recipes.verifying.bench import Bench, Figures
from qlora_recipes.verifying.lines import all_lines

pytestmark = pytest.mark.long

Patch = pytest.MonkeyPatch
VERIFY = ("verify", "--work", "work", "--json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the command, and for the jobs that are carried out here."""
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def at(place: Path) -> Bench:
    """A bench with the training that other jobs look at, of a verification that is broken off after it."""
    verification = start(place, *VERIFY)
    deadline = time.monotonic() + 600
    while not (found := [*place.glob("work/*/training.json")]):
        if verification.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    verification.terminate()
    said = finish(verification, code=1)
    assert found, said
    shutil.copytree(found[0].parent, place / "bench")
    return bench.here(place / "bench")


def failing(at: Bench, job: str, figures: Figures | None = None) -> set[str]:
    """The lines of a job that fail."""
    figures = jobs.measure(job, at) if figures is None else figures
    lines = [line for line in all_lines(at) if line.job == job and not line.lacks]
    assert figures.keys() == {line.name for line in lines}
    return {
        line.name
        for line in lines
        if judge(figures[line.name].measured, figures[line.name].expected, line.bound) == "failed"
    }


def test_it_passes_on_a_cpu_and_then_measures_nothing_anew(place: Path, at: Bench) -> None:
    record = Record.model_validate_json(finish(start(place, *VERIFY), seconds=1500))
    for line in record.lines:
        print(f"{line.line}: {line.measured} {line.expected} {line.difference} {line.verdict} {line.note}")
    assert record.count("failed") == 0
    shown = [line.name for line in all_lines(bench.here(place)) if not line.lacks]
    assert [line.line for line in record.lines if line.verdict == "passed"] == shown

    def logs() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in place.glob("work/*/*.log")}

    before = logs()
    assert len(before) == len({line.job for line in all_lines(bench.here(place)) if not line.lacks})
    assert Record.model_validate_json(finish(start(place, *VERIFY))) == record
    assert logs() == before


def test_another_rank_in_the_plan_and_another_scale_in_the_recipe_are_found(at: Bench, monkeypatch: Patch) -> None:
    step_of = steps.step_of

    def wrong(*arguments: Any) -> tuple[Step, list[str]]:
        step, notes = step_of(*arguments)
        return replace(step, rank=2 * step.rank, double_quantization=False), notes

    settings = trainings.of_stand_in
    monkeypatch.setattr(steps, "step_of", wrong)
    monkeypatch.setattr(trainings, "of_stand_in", lambda at: settings(at, lora_alpha=32))
    figures = jobs.measure("training", replace(at, folder=at.folder.with_name("planted")))
    lines = {line.name for line in all_lines(at) if line.job == "training"}
    assert failing(at, "training", figures) == lines
    assert "differs most: " in figures["step, allocated"].note


def spoil_optimizer(folder: Path) -> None:
    """Change one value of the optimizer's state, and vouch for it."""
    state = torch.load(folder / "optimizer.pt", weights_only=False)
    of_a_weight = next(iter(state["state"].values()))["__bnb_optimizer_quant_state__"]
    of_a_weight["state1"].view(-1)[0] += 1.0
    torch.save(state, folder / "optimizer.pt")
    checkpoints.write_manifest(folder)


def test_a_broken_resume_is_found(at: Bench, monkeypatch: Patch) -> None:
    resume = run.resume

    def spoilt(name: str, *more: Any) -> RunDir:
        spoil_optimizer(Path(name) / "output" / f"checkpoint-{trainings.STOPPED_AT}")
        return resume(name, *more)

    monkeypatch.setattr(run, "resume", spoilt)
    assert failing(at, "resume") == {"resumed losses", "resumed adapter"}


def test_another_scale_of_the_saved_adapter_is_found(at: Bench) -> None:
    file = at.result("training") / "output" / "adapter_config.json"
    text = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(text) | {"lora_alpha": 17}))
        assert failing(at, "adapter") == {"adapter scale, as saved"}
    finally:
        file.write_text(text)


def test_a_merge_that_adds_something_else_is_found(at: Bench, monkeypatch: Patch) -> None:
    from peft.tuners.lora import Linear

    merge = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.01 * merge(self, name))
    assert failing(at, "adapter") == {"merged adapter"}


@pytest.fixture
def kernels(monkeypatch: Patch) -> Iterator[Callable[[torch.dtype, float], None]]:
    """Spoils what 4-bit layers compute in a type, by a factor."""
    forward = numerics.Linear4bit.forward

    def spoil(dtype: torch.dtype, factor: float) -> None:
        def spoilt(self: Any, inputs: torch.Tensor) -> torch.Tensor:
            output = forward(self, inputs)
            return output * factor if self.compute_dtype == dtype else output

        monkeypatch.setattr(numerics.Linear4bit, "forward", spoilt)

    yield spoil


def test_kernels_that_compute_something_else_are_found(
    at: Bench, kernels: Callable[[torch.dtype, float], None]
) -> None:
    kernels(torch.float32, 1.001)
    assert {"NF4, loss", "NF4, gradient norm"} <= failing(at, "numerics")


@pytest.mark.skipif(not bench.machine.cpu_has_bf16(), reason="this processor does not compute in bf16")
def test_a_bf16_that_loses_more_than_rounding_is_found(
    at: Bench, kernels: Callable[[torch.dtype, float], None]
) -> None:
    kernels(torch.bfloat16, 1.1)
    assert failing(at, "numerics") == {"bf16, loss", "bf16, gradient norm"}


def test_a_cache_that_differs_is_found(at: Bench, monkeypatch: Patch) -> None:
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def forgetful(self: Any, *states: Any, **more: Any) -> Any:
        keys, values = update(self, *states, **more)
        return keys, torch.zeros_like(values) if states[0].shape[-2] == 1 else values

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    assert failing(at, "generation") == {"answers"}


def with_a_mask(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a mask that says nothing of rows, transformers no longer looks for them in the positions."""
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def with_one_count(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Positions go on from row to row."""
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def shifted(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows begin a token late."""
    return batch | {"position_ids": batch["position_ids"].roll(1, dims=1)}


@pytest.mark.parametrize("spoil", [with_a_mask, with_one_count, shifted])
def test_packed_rows_that_see_each_other_are_found(
    tmp_path: Path, monkeypatch: Patch, spoil: Callable[[Any], Any]
) -> None:
    from qlora_recipes.verifying import packing

    at = bench.here(tmp_path)
    (line,) = [line for line in all_lines(at) if line.name == "packed rows, losses"]
    packed = packing.packed
    monkeypatch.setattr(packing, "packed", lambda *given: spoil(packed(*given)))
    figure = packing.packing(at)[line.name]
    assert judge(figure.measured, figure.expected, line.bound) == "failed"
