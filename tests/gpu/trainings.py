"""Trainings by the command `recipe`: of the rehearsal's model, and of random weights in other models' shapes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import random_models
from memory_plugin import MEMORY, SHARE, STOP

from qlora_recipes.base import hardware, yamlfiles
from qlora_recipes.base.files import read_json
from qlora_recipes.base.paths import find_recipe
from qlora_recipes.config import gpus, models, substitution

GPU = gpus.here()
BF16 = GPU.capability >= (8, 0) if GPU else hardware.cpu_has_bf16()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(GPU is None, reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(len(hardware.visible_gpus()) < 2, reason="needs two GPUs")

RECIPE = "haider2024/code-llama-7b"
SHAPES = ("haider2024/llama-3.2-3b", "haider2024/llama-2-7b", "haider2024/llama-3-8b")
"""Recipes of the study by size; the models of the others have these shapes, but for 16 tokens of Code Llama's."""
STEPS, LENGTH = 6, 128
STOPPED_AT = 4  # the optimizer has a state by then, and steps are left; the recipe saves no checkpoint there
LAYERS = 4  # of a part of a model
LIMIT = 900  # seconds for a command; ranks that wait for each other would never end
SUPPORT = Path(__file__).parents[1] / "support"
FORCE = ("--force", "foreign-code:plugins.0")  # memory_plugin
UNSAVED = {"saves_per_epoch": None, "save_strategy": "no"}


def recipe(*words: str | Path, code: int = 0, **env: str) -> str:
    """Run the command; what it prints on stdout."""
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    command = [Path(sys.executable).with_name("recipe"), *words]
    environment = os.environ | {"PYTHONPATH": path} | env
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    assert done.returncode == code, f"{done.stderr.strip().splitlines()[-1:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def settings(model: Path, rows: Path, length: int, **changes: Any) -> dict[str, Any]:
    """Changes to a recipe that train a model on full rows; null deletes a key."""
    return {
        "base_model": str(model),
        "revision_of_model": None,
        "special_tokens": {"pad_token": "</s>"},
        "datasets": [{"path": str(rows), "type": "alpaca"}],
        "test_datasets": None,
        "evals_per_epoch": None,
        "sequence_len": length,
        "pad_to_sequence_len": True,  # every micro batch has the planned shape
        "excess_length_strategy": "truncate",
        "num_epochs": 1,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 1,
        "plugins": ["memory_plugin.MemoryPlugin"],
    } | changes


def of_small_model(folder: Path, **changes: Any) -> dict[str, Any]:
    """Changes to a recipe that train the rehearsal's model for a few steps.

    On a CPU in fp32, which plans follow most closely. On a GPU attention is eager: the backward pass of the others adds
    in any order, so that two equal trainings differ in their last bits.
    """
    rows, model = folder / "small model.jsonl", small_model(folder)
    if not rows.is_file():
        random_models.write_full_rows(rows, model, LENGTH, STEPS * 4)
    exact = {"attn_implementation": "eager", "special_tokens": None} if GPU else {"bf16": False}
    return settings(model, rows, LENGTH) | exact | changes


def small_model(folder: Path) -> Path:
    """The rehearsal's model; on a CPU random weights in its shape with fewer layers, which train in seconds."""
    model, few = substitution.model_folder(), folder / "small model"
    if GPU:
        return model
    if not few.is_dir():
        random_models.make(few, read_json(model / "config.json") | {"num_hidden_layers": LAYERS})
    return few


def train(folder: Path, name: str, recipe_name: str, changes: dict[str, Any], *words: str, stop: int = 0) -> Path:
    """Train a recipe with some changes, to its end or until after a step; the run's folder."""
    file = folder / f"{name}.yaml"
    file.write_text(yamlfiles.write_yaml(changes), encoding="utf-8")
    rehearsal = () if GPU else ("--profile", "rehearsal")
    env = {STOP: str(stop)}
    asked = ("run", recipe_name, *rehearsal, "--profile", file, *words, *FORCE)
    recipe("--runs", folder / name, *asked, code=1 if stop else 0, **env)
    (record,) = (folder / name).rglob("run.json")
    return record.parent


def metrics(run: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "step" in record]


def logged(run: Path, key: str) -> dict[int, float]:
    """The losses or gradient norms of a run by step; infinite where not a number."""
    return {
        record["step"]: float("inf") if record[key] is None else record[key] for record in metrics(run) if key in record
    }


def relative(values: dict[int, float], exact: dict[int, float]) -> float | None:
    """The largest difference from exact values, as a share of these; None if steps are missing."""
    if values.keys() != exact.keys() or not exact:
        return None
    return max(0.0 if values[step] == exact[step] else abs(values[step] / exact[step] - 1) for step in exact)


def rate(run: Path) -> float:
    """Tokens a second, without the first step, in which CUDA is set up."""
    counted = [record for record in metrics(run) if record.get("tokens") and record["step"] > 1]
    return sum(record["tokens"] for record in counted) / sum(record["step_seconds"] for record in counted)


def plan(run: Path) -> dict[str, Any]:
    """The plan of a run's config for this machine's GPU, on a CPU for a T4."""
    card = ("--gpu", "T4") if GPU is None else ()
    text = recipe("plan", run / "config.yaml", *card, *FORCE, "--json")
    return dict(json.loads(text)[0])


@contextmanager
def random_weights(folder: Path, recipe_name: str, layers: int | None = None) -> Iterator[tuple[Path, int]]:
    """Random weights in the shape of a recipe's model, with all of its layers or some, and the length of its rows."""
    config = yamlfiles.read_yaml(find_recipe(recipe_name)[1])
    architecture = models.architecture(config, download=False) | ({"num_hidden_layers": layers} if layers else {})
    needed = json.loads(recipe("plan", recipe_name, "--json"))[0]["memory"]["needed"]
    if not layers and needed > SHARE * free_memory():
        pytest.skip(f"needs {needed / 2**30:.1f} GiB, and {SHARE * free_memory() / 2**30:.1f} may be used")
    model = folder / "random-weights"
    try:
        random_models.make(model, architecture)
        yield model, config["sequence_len"]
    finally:
        shutil.rmtree(model, ignore_errors=True)


def free_memory() -> int:
    """Bytes of the first visible GPU's memory that are free, by the driver."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def memory(run: Path) -> dict[str, Any]:
    return read_json(run / MEMORY)
