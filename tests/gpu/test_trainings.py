"""Memory, numbers and speed of trainings, beside plans and each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_models
from figures import Figure
from memory_plugin import BEGUN
from safetensors.torch import load_file
from trainings import (
    BF16,
    GPU,
    LAYERS,
    RECIPE,
    SHAPES,
    STEPS,
    STOPPED_AT,
    UNSAVED,
    free_memory,
    logged,
    memory,
    metrics,
    needs_gpu,
    needs_two_gpus,
    of_stand_in,
    plan,
    random_weights,
    rate,
    recipe,
    relative,
    settings,
    train,
)  # fmt: skip

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import read_json
from qlora_recipes.base.paths import find_recipe
from qlora_recipes.data.sample import usual_sample

ScorerModel = Callable[..., None]
MIB = 2**20
WEIGHTS = ("base weights", "quantization constants", "embeddings and head", "adapters")
HALF = {"lora_dropout": 0.0, "attn_implementation": "sdpa"}


def test_memory_of_a_step(training: Path, judge: ScorerModel) -> None:
    found, planned = memory(training), plan(training)
    parts = planned["memory"]["parts"]
    allocated = planned["memory"]["allocated"] - (0 if GPU else parts["kernels' own"])  # CUDA's alone
    judge(
        Figure("trained parameters", found["trainable"], planned["trainable"]),
        # plans round tensors to CUDA's blocks of 512 bytes, 0.2 % of a small model
        Figure("weights in memory", found["loaded"] / MIB, sum(parts[name] for name in WEIGHTS) / MIB, 0.005, "MiB"),
        # on a CPU 0.1 % off, for the same reason; on a T4 at most 0.9 %, by 39 published runs of a plain loop
        Figure("step, allocated", found["allocated"] / MIB, allocated / MIB, 0.02 if GPU else 0.005, "MiB"),
    )


def test_adapter_scale_in_training(training: Path, judge: ScorerModel) -> None:
    config = yamlfiles.read_yaml(find_recipe(RECIPE)[1])
    scales = memory(training)["scales"]
    found = scales[0] if len(scales) == 1 else None
    judge(Figure("adapter scale, in training", found, config["lora_alpha"] / config["lora_r"]))


def test_resume_to_the_same_adapter(training: Path, folder: Path, judge: ScorerModel) -> None:
    run = train(folder, "stopped", RECIPE, of_stand_in(folder), stop=STOPPED_AT)
    recipe("resume", run)
    pairs = [logged(each, key) for key in ("loss", "grad_norm") for each in (training, run)]
    adapters = [load_file(each / "output" / "adapter_model.safetensors") for each in (training, run)]
    same = [{name: tensor.shape for name, tensor in adapter.items()} for adapter in adapters]
    differ = sum(int((tensor != adapters[1][name]).sum()) for name, tensor in adapters[0].items())
    judge(
        Figure("resumed after step", read_json(run / BEGUN)["step"], STOPPED_AT),
        Figure("resumed, difference of losses", relative(*pairs[:2])),  # the same numbers are added in the same order
        Figure("resumed, difference of gradient norms", relative(*pairs[2:])),
        Figure("resumed, values of the adapter that differ", differ if same[0] == same[1] else None),
    )


@needs_gpu
def test_half_precision(folder: Path, judge: ScorerModel) -> None:
    formats = ["fp32", "fp16", *(["bf16"] if BF16 else [])]
    runs = {
        name: train(folder, name, RECIPE, of_stand_in(folder, **HALF, fp16=name == "fp16", bf16=name == "bf16"))
        for name in formats
    }
    exact = logged(runs["fp32"], "loss")
    # fp16 rounds by 5e-4, and a step that overflows leaves the adapter as it was; bf16 by 4e-3, in a mean by less
    figures = [
        Figure(f"{name}, losses", relative(logged(runs[name], "loss"), exact), bound=0.02) for name in formats[1:]
    ]
    overflows = sum(norm == float("inf") for norm in logged(runs["fp16"], "grad_norm").values())
    # the scaler begins with a factor of 65,536, and halves it each time
    judge(*figures, Figure(f"fp16, steps of {STEPS} that overflow", overflows, bound=2))


@needs_gpu
def test_profile_fast(folder: Path, judge: ScorerModel) -> None:
    every = {
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "lora_target_modules": None,
    }  # so that nothing is left out
    changes = of_stand_in(folder, attn_implementation="sdpa", **every)
    plain, fast = (train(folder, f"stand-in{of}", RECIPE, changes, *words) for of, words in with_and_without("fast"))
    with random_weights(folder, SHAPES[0], LAYERS) as (model, length):
        rows = folder / "full.jsonl"
        random_models.write_full_rows(rows, model, length, 4 * STEPS)
        before, after = compare_speed(folder, "fast", settings(model, rows, length, **UNSAVED, **every))
    judge(
        # other orders of adding, in half precision, as under an engine
        Figure("fast, losses", relative(logged(fast, "loss"), logged(plain, "loss")), bound=0.01),
        Figure("fast, share by which it is slower", 1 - rate(after) / rate(before), bound=0.05),  # that may be chance
    )


@needs_gpu
def test_profile_packed(folder: Path, judge: ScorerModel) -> None:
    with random_weights(folder, SHAPES[0], LAYERS) as (model, length):
        rows = usual_sample() / "train.jsonl"
        changes = settings(model, rows, length, **UNSAVED, pad_to_sequence_len=False)
        before, after = compare_speed(folder, "packed", changes)
    counted = [sum(record.get("tokens", 0) for record in metrics(run)) for run in (before, after)]
    filled = min(counted[0] / counted[1], 1.0)  # all tokens of packed rows count, as they have no mask
    judge(Figure("packed, share by which it is slower", 1 - rate(after) * filled / rate(before), bound=0.05))


def with_and_without(profile: str) -> list[tuple[str, tuple[str, ...]]]:
    return [("", ()), (f"-{profile}", ("--profile", profile))]


def compare_speed(folder: Path, profile: str, changes: dict[str, Any]) -> list[Path]:
    """Trainings of a few layers without a profile, and with it."""
    return [
        train(folder, f"layers-{profile}-{of}", SHAPES[0], changes, *words) for of, words in with_and_without(profile)
    ]


@needs_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_shape(folder: Path, judge: ScorerModel, name: str) -> None:
    short = name.rpartition("/")[2]
    with random_weights(folder, name) as (model, length):
        rows = folder / f"{short}.jsonl"
        config = yamlfiles.read_yaml(find_recipe(name)[1])
        random_models.write_full_rows(rows, model, length, 6 * config["micro_batch_size"])
        free = free_memory()
        run = train(folder, short, name, settings(model, rows, length, **UNSAVED))
        found, planned = memory(run), plan(run)
        in_use, needed, speed = free - found["free"], planned["memory"], planned["work"]["tokens_per_second"]
        judge(
            Figure(f"{short}, allocated", found["allocated"] / MIB, needed["allocated"] / MIB, 0.02, "MiB"),
            # what is reserved was at most 14 % off in the same runs
            Figure(f"{short}, reserved", found["reserved"] / MIB, needed["reserved"] / MIB, 0.15, "MiB"),
            Figure(f"{short}, in use by the driver", in_use / MIB, needed["needed"] / MIB, 0.15, "MiB"),
            # plans assume 30 % of a GPU's peak rate, if that is listed
            *([Figure(f"{short}, speed", rate(run), speed, 0.5, "tokens/s")] if speed else []),
        )


@needs_two_gpus
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_engine(folder: Path, judge: ScorerModel, engine: str) -> None:
    changes = of_stand_in(folder, lora_dropout=0.0)  # each rank would drop others
    runs = [*folder.glob("alone/**/run.json")]
    alone = runs[0].parent if runs else train(folder, "alone", RECIPE, changes)
    divided = train(folder, engine, RECIPE, changes, "--profile", engine, "--gpus", "2")
    # other orders of adding, in half precision; as in tests/runs/test_engines.py
    judge(Figure(f"{engine}, losses", relative(logged(divided, "loss"), logged(alone, "loss")), bound=0.01))
