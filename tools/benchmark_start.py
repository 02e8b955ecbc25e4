"""How long it takes to the first training step: `recipe run` beside `axolotl train` of the same config."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import tiny_llama

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.data.sample import usual_sample

PAIRS = 5
BIN = Path(sys.executable).parent
PATH = f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # has accelerate, which `axolotl train` starts
OFFLINE = {"PATH": PATH} | {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_STEP = b"'loss'"  # in what the trainer logs of its first step


def config(folder: Path) -> Path:
    """Write a recipe with a tiny model, the sample's rows and one step, without evaluation."""
    tiny_llama.save(folder / "tiny")
    rows = folder / "train.jsonl"
    rows.write_bytes((usual_sample() / "train.jsonl").read_bytes())
    change = {
        "base_model": str(folder / "tiny"),
        "datasets": [{"path": str(rows), "type": "alpaca"}],
        "fp16": False,
        "max_steps": 1,
        "logging_steps": 1,
        "output_dir": str(folder / "plain"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    without = ("revision_of_model", "special_tokens", "test_datasets", "evals_per_epoch", "num_epochs", "warmup_steps")
    written = yamlfiles.read_yaml(paths.recipe_file("haider2024/llama-3.1-8b")) | change
    file = folder / "start.yaml"
    file.write_text(yamlfiles.write_yaml({key: value for key, value in written.items() if key not in without}))
    return file


def first_step(command: list[str], folder: Path, logs: str) -> tuple[float, float]:
    """Seconds until a log under a folder has the first training step, and when the command began, since 1970.

    Raises:
        RuntimeError: the command ended without a step.
    """
    began, started, seconds = time.time(), time.perf_counter(), 0.0
    before = set(folder.glob(logs))
    with (folder / "plain.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | OFFLINE, stdout=log, stderr=log)
        while not seconds:
            time.sleep(0.02)
            ended = process.poll() is not None
            new = [file for file in folder.glob(logs) if file not in before or file.name == "plain.log"]
            if any(_STEP in file.read_bytes() for file in new):
                seconds = time.perf_counter() - started
            elif ended:
                raise RuntimeError((folder / "plain.log").read_text()[-3000:])
        process.wait()
    return seconds, began


def phases(folder: Path, began: float) -> dict[str, float]:
    """Seconds of each phase of the newest run of `recipe run` up to its first step, by what run.json and metrics.jsonl
    note of it."""
    run = max(folder.glob("runs/**/run.json"), key=lambda file: file.stat().st_mtime)
    launch = orjson.loads(run.read_bytes())["launches"][0]
    records: list[dict[str, Any]] = [*map(orjson.loads, run.with_name("metrics.jsonl").read_bytes().splitlines())]
    marks = [("checks, hashes and record", began), ("imports and config", _seconds(launch["started"]))]
    marks += [(record["phase"], record["time"]) for record in records if record.get("phase")][:2]
    marks.append(("", next(record["time"] for record in records if record.get("loss"))))
    return {name: after - at for (name, at), (_, after) in pairwise(marks)}


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def pairs(folder: Path, count: int = PAIRS) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Seconds to the first step of `recipe run` and of `axolotl train`, one after the other, with the phases of the
    former. The first pair, which tokenizes the rows and reads the packages from the disk, is not among them."""
    file = config(folder)
    ours = [str(BIN / "recipe"), "run", str(file), "--runs", str(folder / "runs")]
    theirs = [str(BIN / "axolotl"), "train", str(file)]
    for number in range(count + 1):
        seconds, began = first_step(ours, folder, "runs/**/train.log")
        split = phases(folder, began)
        plain, _ = first_step(theirs, folder, "plain.log")
        if number:
            yield seconds, plain, split


def start(folder: Path) -> tuple[float, float, float, dict[str, float]]:
    """The median of the ratios of pairs, the medians of `recipe run` and `axolotl train` in seconds, and those of the
    former's phases."""
    measured = list(pairs(folder))
    ratio = statistics.median(pair[0] / pair[1] for pair in measured)
    split = {name: statistics.median(each[name] for *_, each in measured) for name in measured[0][2]}
    ours, theirs = (statistics.median(pair[at] for pair in measured) for at in (0, 1))
    return ratio, ours, theirs, split


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as of_pairs:
        for one in pairs(Path(of_pairs)):
            print(one, flush=True)
