"""The table of the README that `make benchmark` writes: how long things take, as ratios of two times of one run."""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import psutil

from qlora_recipes.base import paths
from qlora_recipes.terminal import tables

README = paths.RECIPES.parent / "README.md"
BEGIN, END = "<!-- made by `make benchmark` -->\n", "<!-- until here -->\n"
Measured = tuple[float, float, bool]
"""Bytes a second of processor time, peak memory in MiB, and whether all rows are accounted for."""


def processor_time(command: Sequence[str | Path]) -> float:
    """Seconds of processor time that a command takes; it has to succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def scoring(folder: Path, count: int = 5_000) -> tuple[float, float]:
    """Seconds of processor time of `recipe score` with so many pairs of a review comment's length, and of importing
    and calling sacrebleu alone on them, which is one of its four scores; the least of five, as some take twice that."""
    words = [f"word{i}" for i in range(17)]
    file = folder / "pairs.jsonl"
    with file.open("w") as stream:
        for i in range(count):
            reference, prediction = ([words[(i * k + j * j) % 17] for j in range(6 + (i * k) % 23)] for k in (7, 5))
            stream.write(json.dumps({"reference": " ".join(reference), "prediction": " ".join(prediction)}) + "\n")
    alone = (
        "import json, sys; from sacrebleu import corpus_bleu; rows = [*map(json.loads, open(sys.argv[1]))];"
        "corpus_bleu([row['prediction'] for row in rows], [[row['reference'] for row in rows]])"
    )
    command = [Path(sys.executable).with_name("recipe"), "score", file, "--bertscore", "none", "--json"]
    both = command, [sys.executable, "-c", alone, file]
    times = [[processor_time(one) for one in both] for _ in range(5)]
    scored, sacrebleu = map(min, zip(*times, strict=True))
    return scored, sacrebleu


def growth(prepared: Callable[[Path, int], Measured], few: int = 250_000) -> tuple[float, float, float, float]:
    """How much more time a row takes, and how much more memory all of them, in four times as many rows.

    Returns:
        The ratio of the times of a row, that of the peaks of memory, the larger peak in MiB, and megabytes a second.
    """
    found = []
    for count in (few, 4 * few):
        with tempfile.TemporaryDirectory() as folder:
            found.append(prepared(Path(folder), count))
    (speed, memory, _), (speed_of_more, memory_of_more, _) = found
    assert all(whole for *_, whole in found)
    return speed / speed_of_more, memory_of_more / memory, memory_of_more, speed_of_more / 1e6


def machine() -> str:
    """What the figures were measured on and with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("axolotl", "torch"))
    cores = f"{psutil.cpu_count()} cores ({model}), load {os.getloadavg()[0]:.0f}"
    return f"{datetime.now(UTC):%Y-%m-%d}: {cores}, Python {platform.python_version()}, {packages}"


def _markdown(rows: list[dict[str, str]]) -> str:
    with redirect_stdout(StringIO()) as text:
        tables.print_markdown(rows)
    return text.getvalue()


def write(rows: list[dict[str, str]], file: Path = README) -> None:
    """Put a table between the two markers of the README, if it has them; what it was measured on heads its last column,
    which has no name in the rows."""
    text = file.read_text()
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if begun and ended:
        headed = [{key or machine(): value for key, value in row.items()} for row in rows]
        file.write_text(before + BEGIN + _markdown(headed).strip() + "\n" + END + after)
