"""Trainings through Axolotl, of the stand-in and of random weights in other shapes, and what they show."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..backends.local import Local
from ..base import yamlfiles
from ..base.errors import WorkFailed
from ..base.files import read_json
from ..base.paths import find_recipe
from ..base.yamlfiles import Config
from ..configs import models, standin
from ..configs.compose import REHEARSAL, Request
from ..data.sample import usual_sample
from ..running import run
from ..runs.lookup import all_runs
from ..runs.rundir import RunDir
from . import memory, shapes
from .bench import MEMORY, RECIPE, STOP, Bench, Figure, Figures, free_memory

ADAPTER = "adapter_model.safetensors"
STOPPED_AT = 4
"""The step after which a training is broken off: its optimizer has a state by then, and steps are left. The recipe
saves no checkpoint of its own there."""
STEPS = 6
LENGTH = 128  # tokens of a row of the stand-in's, which a CPU trains on in a second or two
LAYERS = 4  # of a model in a quick verification
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SHAPES = ("haider2024/llama-3.2-3b", "haider2024/llama-2-7b", "haider2024/llama-3-8b")
"""Recipes of the study by size. The models of the others have these shapes, but for 16 tokens of Code Llama's."""


def _settings(model: Path, rows: Path, length: int, accumulated: int) -> Config:
    """What a verification changes in a recipe; null deletes a key."""
    return {
        "base_model": str(model),
        "revision_of_model": None,
        "special_tokens": None if model == standin.folder() else {"pad_token": "</s>"},
        "datasets": [{"path": str(rows), "type": "alpaca"}],
        "test_datasets": None,
        "evals_per_epoch": None,
        "sequence_len": length,
        "pad_to_sequence_len": True,  # every micro batch has the planned shape
        "excess_length_strategy": "truncate",
        "num_epochs": 1,
        "gradient_accumulation_steps": accumulated,
        "warmup_steps": 1,
        "plugins": ["qlora_recipes.verifying.plugin.VerifyPlugin"],
    }


def of_stand_in(bench: Bench, **changes: Any) -> Config:
    """The change of the recipe that trains the stand-in for a few steps.

    On a CPU it is in fp32, which plans follow most closely. On a GPU attention is eager: the backward pass of the
    others adds in any order, so that two trainings alike differ in their last bits.
    """
    model = standin.model_folder()
    rows = bench.folder / "rows" / "stand-in.jsonl"
    if not rows.is_file():
        shapes.write_full_rows(rows, model, LENGTH, STEPS * 4)
    own = {"attn_implementation": "eager"} if bench.gpu else {"bf16": False}
    return _settings(model, rows, LENGTH, 2) | own | changes


def train(
    bench: Bench, name: str, recipe: str, settings: Config, engine: str = "", stop: int = 0, profile: str = ""
) -> RunDir:
    """Train a recipe with some settings to its end, or until after a step.

    Args:
        name: of the folder for the run, which is emptied.
        engine: the profile that divides it between two GPUs.
        stop: the step to stop after; 0 for none.
        profile: one to lay over the settings.

    Raises:
        WorkFailed: Axolotl failed, or the training was stopped by someone else.
    """
    runs = bench.runs / name
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    changes = runs / "verify.yaml"
    changes.write_text(yamlfiles.write_yaml(settings), encoding="utf-8")
    profiles = [*([] if bench.gpu else [REHEARSAL]), str(changes), *filter(None, (engine, profile))]
    request = Request(recipe, profiles, rehearse=not bench.gpu, gpus=2 if engine else 1)
    backend = Local(not bench.gpu)
    with _stopping_after(stop):
        try:
            return run.start(request, runs, backend)
        except WorkFailed:
            folders = all_runs(runs)
            stopped = folders[-1].read() if stop and folders else None
            if not stopped or stopped.state != "interrupted" or stopped.summary.step != stop:
                raise
            return folders[-1]


@contextmanager
def _stopping_after(step: int) -> Iterator[None]:
    """Have the plugin stop a training that begins in the block."""
    if step:
        os.environ[STOP] = str(step)
    try:
        yield
    finally:
        os.environ.pop(STOP, None)


def training(bench: Bench) -> Figures:
    """The stand-in, trained by the recipe's settings: memory, parameters, and the scale of the adapter."""
    folder = train(bench, "undisturbed", RECIPE, of_stand_in(bench))
    bench.note_result("training", folder.path)
    config = yamlfiles.read_yaml(folder.config)
    found, plan = read_json(folder.path / MEMORY), memory.planned(config, bench)
    recipe = yamlfiles.read_yaml(find_recipe(RECIPE)[1])
    scales = found["scales"]
    return {
        "trained parameters": Figure(folder.read().summary.trainable_parameters, plan.parameters),
        "weights in memory": Figure(found["loaded"] / memory.MIB, plan.loaded / memory.MIB),
        "step, allocated": memory.allocated(plan, found),
        "adapter scale, in training": Figure(
            scales[0] if len(scales) == 1 else None, recipe["lora_alpha"] / recipe["lora_r"]
        ),
    }


def resume(bench: Bench) -> Figures:
    """The same training, broken off and resumed, beside the undisturbed one."""
    undisturbed = RunDir(bench.result("training"))
    broken = train(bench, "broken-off", RECIPE, of_stand_in(bench), stop=STOPPED_AT)
    backend = Local(not bench.gpu)
    resumed = run.resume(str(broken.path), bench.runs, backend)
    return compared(undisturbed, resumed)


def compared(undisturbed: RunDir, resumed: RunDir) -> Figures:
    """A resumed training beside one that nothing disturbed."""
    last = resumed.read().launches[-1].resumed_from or "checkpoint-0"
    logged = [_logged(folder) for folder in (undisturbed, resumed)]
    same_steps = logged[0].keys() == logged[1].keys()
    pairs = [(value, logged[1][key]) for key, value in logged[0].items()] if same_steps else []
    apart = max((0.0 if one == other else abs(one - other) for one, other in pairs), default=None)
    return {
        "resumed after step": Figure(int(last.rpartition("-")[2]), STOPPED_AT),
        "resumed losses": Figure(apart, note="" if same_steps else "other steps were logged"),
        "resumed adapter": Figure(values_that_differ(undisturbed.output / ADAPTER, resumed.output / ADAPTER)),
    }


def _logged(folder: RunDir) -> dict[tuple[int, str], float]:
    """The losses and gradient norms of a run, by step."""
    return {
        (record["step"], key): float("inf") if record[key] is None else record[key]
        for record in folder.read_metrics()
        for key in ("loss", "grad_norm")
        if key in record
    }


def values_that_differ(one: Path, other: Path) -> int | None:
    """How many values of two adapters differ in any bit; None where they do not have the same tensors."""
    from safetensors.torch import load_file

    tensors, others = load_file(one), load_file(other)
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in others.items()}:
        return None
    return sum(int((tensor != others[name]).sum()) for name, tensor in tensors.items())


def precision(bench: Bench) -> Figures:
    """The stand-in trained in half precision beside fp32, through Axolotl and, in fp16, its gradient scaler."""
    common = {"attn_implementation": "sdpa", "lora_dropout": 0.0}
    formats = {"fp32": {"fp16": False, "bf16": False}, "fp16": {"fp16": True, "bf16": False}}
    if bench.bf16:
        formats["bf16"] = {"fp16": False, "bf16": True}
    logged = {}
    for name, settings in formats.items():
        logged[name] = _logged(train(bench, f"in-{name}", RECIPE, of_stand_in(bench, **common, **settings)))
    exact = _of("loss", logged.pop("fp32"))
    figures: dict[str, Figure] = {}
    for name, steps in logged.items():
        figures[f"{name} losses"] = Figure(_relative(_of("loss", steps), exact))
    overflowed = [step for step, norm in _of("grad_norm", logged["fp16"]).items() if norm == float("inf")]
    figures["fp16 steps that overflow"] = Figure(
        len(overflowed), note=f"of {STEPS}: {overflowed}" if overflowed else ""
    )
    return figures


def _of(kind: str, logged: dict[tuple[int, str], float]) -> dict[int, float]:
    return {step: value for (step, key), value in logged.items() if key == kind}


def _relative(values: dict[int, float], exact: dict[int, float]) -> float | None:
    """The largest difference of values from exact ones, as a share of these; None where some are missing."""
    if values.keys() != exact.keys() or not exact:
        return None
    return max(abs(values[step] / exact[step] - 1) for step in exact)


def shape(bench: Bench, recipe: str) -> Figures:
    """A recipe's own step on random weights in its model's shape: memory and speed."""
    config = yamlfiles.read_yaml(find_recipe(recipe)[1])
    label = short(recipe)
    rows = bench.folder / "rows" / f"{label}.jsonl"
    with _random_weights(bench, recipe, LAYERS if bench.quick else None) as (model, length):
        accumulated = 2  # there are gradients of an earlier micro batch, as with the recipe's 4
        shapes.write_full_rows(rows, model, length, 3 * accumulated * config["micro_batch_size"])
        settings = _settings(model, rows, length, accumulated) | _UNSAVED
        free = free_memory()
        folder = train(bench, label, recipe, settings)
        composed = yamlfiles.read_yaml(folder.config)
        found, plan = read_json(folder.path / MEMORY), memory.planned(composed, bench)
        reserved, in_use = memory.on_gpu(plan, found, free)
        return {
            f"{label}: allocated": memory.allocated(plan, found),
            f"{label}: reserved": reserved,
            f"{label}: in use, by the driver": in_use,
            f"{label}: tokens/s": memory.speed(composed, bench, _rate(folder)),
        }


_UNSAVED = {"saves_per_epoch": None, "save_strategy": "no"}


@contextmanager
def _random_weights(bench: Bench, recipe: str, layers: int | None) -> Iterator[tuple[Path, int]]:
    """Random weights in the shape of a recipe's model, with all of its layers or some, and the length of its rows."""
    config = yamlfiles.read_yaml(find_recipe(recipe)[1])
    architecture = models.architecture(config, download=False) | ({"num_hidden_layers": layers} if layers else {})
    memory.require_room(config, architecture, bench)
    model = bench.folder / "models" / short(recipe)
    shutil.rmtree(model, ignore_errors=True)
    try:
        shapes.make(model, architecture)
        yield model, config["sequence_len"]
    finally:
        shutil.rmtree(model, ignore_errors=True)


def _rate(folder: RunDir) -> float | None:
    """Tokens a second, without the first step, in which CUDA is set up."""
    counted = [record for record in folder.read_metrics() if record.get("tokens") and record["step"] > 1]
    seconds = sum(record["step_seconds"] for record in counted)
    return sum(record["tokens"] for record in counted) / seconds if seconds else None


def short(recipe: str) -> str:
    """A recipe's name without its study."""
    return recipe.rpartition("/")[2]


def engine(bench: Bench, engine: str) -> Figures:
    """The stand-in on two GPUs under an engine, beside one GPU."""
    settings = of_stand_in(bench, lora_dropout=0.0)  # each rank would drop others
    alone = bench.runs / "alone"
    if not all_runs(alone):
        train(bench, "alone", RECIPE, settings)
    exact = _of("loss", _logged(all_runs(alone)[-1]))
    divided = train(bench, f"under-{engine}", RECIPE, settings, engine)
    return {f"{engine} losses": Figure(_relative(_of("loss", _logged(divided)), exact))}


def fast(bench: Bench) -> Figures:
    """The profile fast: the stand-in's losses, and the speed of a few layers of a larger model; without dropout and
    with LoRA on all layers, so that nothing of it is left out but by the card."""
    of_all = {"lora_dropout": 0.0, "lora_target_linear": True, "lora_target_modules": None}
    settings = of_stand_in(bench, attn_implementation="sdpa", **of_all)
    plain = train(bench, "without-fast", RECIPE, settings)
    quick = train(bench, "with-fast", RECIPE, settings, profile="fast")
    apart = _relative(_of("loss", _logged(quick)), _of("loss", _logged(plain)))
    with _random_weights(bench, SHAPES[0], LAYERS) as (model, length):
        rows = bench.folder / "rows" / "full.jsonl"
        shapes.write_full_rows(rows, model, length, 4 * STEPS)
        of_rows = _settings(model, rows, length, 2) | _UNSAVED | of_all
        before, after = _beside(bench, of_rows, "fast")
    return {"fast, losses": Figure(apart), "fast, tokens/s": _slower(_rate(after), _rate(before))}


def packed(bench: Bench) -> Figures:
    """The profile packed: the speed of a few layers of a larger model on rows of the lengths that the sample has."""
    with _random_weights(bench, SHAPES[0], LAYERS) as (model, length):
        of_rows = _settings(model, usual_sample() / "train.jsonl", length, 2) | _UNSAVED
        before, after = _beside(bench, of_rows | {"pad_to_sequence_len": False}, "packed")
    counted = [sum(record.get("tokens", 0) for record in folder.read_metrics()) for folder in (before, after)]
    filled = min(counted[0] / counted[1], 1.0) if counted[1] else 0  # of packed rows, which have no mask, all counts
    return {"packed, tokens/s": _slower((_rate(after) or 0) * filled, _rate(before))}


def _beside(bench: Bench, settings: Config, profile: str) -> tuple[RunDir, RunDir]:
    """A training without a profile, and one with it, of a few layers."""
    plain = train(bench, f"few-layers-without-{profile}", SHAPES[0], settings)
    return plain, train(bench, f"few-layers-{profile}", SHAPES[0], settings, profile=profile)


def _slower(rate: float | None, plain: float | None) -> Figure:
    """By which share a rate is below another; 0 where it is not."""
    if not (rate and plain):
        return Figure(None)
    return Figure(max(0.0, 1 - rate / plain), note=f"{rate / plain:.2f} times as many tokens a second")
