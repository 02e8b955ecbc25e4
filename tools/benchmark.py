"""How long things take: the quick commands, a plan, the preparation of data and the start of a training.

`make benchmark` prints it; the ratios of two times that were measured one after the other are the README's table.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import psutil
import tiny_llama

from qlora_recipes import tables
from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.data.sample import usual_sample

BIN = Path(sys.executable).parent
COMMANDS = [
    ["list"],
    ["show", "haider2024/llama-2-7b"],
    ["diff", "haider2024/llama-2-7b", "haider2024/llama-3-8b"],
    ["check", "haider2024/llama-2-7b"],
    ["check"],
    ["render", "--check"],
    ["results"],
]
COMPLETION = {"_RECIPE_COMPLETE": "complete_bash", "COMP_WORDS": "recipe run code", "COMP_CWORD": "2"}
QUICK = 0.3
"""Seconds beyond an empty interpreter that `list`, `show` and `results` without runs may take."""
OFFLINE = {
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # has accelerate, which `axolotl train` starts
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_WAIT_POLICY": "PASSIVE",
}
PAIRS = 5


def beyond(command: list[str], **env: str) -> float:
    """Median over five pairs of the wall seconds that a command takes beyond an empty interpreter."""

    def seconds(command: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run(command, env=os.environ | env, capture_output=True)
        return time.perf_counter() - started

    return statistics.median(seconds(command) - seconds([sys.executable, "-c", ""]) for _ in range(5))


def preparation(count: int, size: int = 2000) -> tuple[float, float, float]:
    """Seconds of processor time and peak memory in MiB for so many raw rows of some size, and their megabytes."""
    sample = paths.RECIPES / "haider2024" / "sample"
    texts = [json.loads(line) for file in sorted(sample.glob("*.jsonl")) for line in file.open()]
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "msg-train.jsonl")
        with file.open("w") as stream:
            for i in range(count):
                padding = ("\n".join(texts[i % 7]["patch"] for _ in range(40)) * 10)[: size - 1000]
                stream.write(json.dumps(texts[i % len(texts)] | {"id": i, "oldf": padding}) + "\n")
        arguments = ["data", "prepare", str(file), "--out", f"{name}/prepared", "--json"]
        code = (
            "import sys, time; from qlora_recipes import cli; cli.main(sys.argv[1:]);"
            "print(time.process_time(), open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True, text=True)
        printed, _, measured = done.stdout.strip().rpartition("\n")
        split = json.loads(printed)["splits"]["train"]
        assert split["read"] == count == split["rows"] + sum(split["dropped"].values())
        seconds, peak = map(float, measured.split())
        return seconds, peak / 1024, file.stat().st_size / 1e6


def plan(name: str = "haider2024/code-llama-7b") -> tuple[float, float]:
    """Seconds of processor time for the first plan of a recipe beyond the imports, and for these."""
    from qlora_recipes.configs import gpus
    from qlora_recipes.planning import plan as planning

    started = time.process_time()
    from qlora_recipes.planning import layers  # noqa: F401  (imports torch and transformers)

    imported = time.process_time()
    planning.plan(yamlfiles.read_yaml(paths.recipe_file(name)), gpus.find("T4"))
    return time.process_time() - imported, imported - started


def config(folder: Path) -> Path:
    """Write a recipe with a tiny model, the sample's rows and one step, without evaluation."""
    tiny_llama.save(folder / "tiny")
    change = {
        "base_model": str(folder / "tiny"),
        "datasets": [{"path": str(usual_sample() / "train.jsonl"), "type": "alpaca"}],
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


def first_step(command: list[str | Path], folder: Path, logs: str) -> float:
    """Seconds until a new log under a folder has the first training step.

    Raises:
        RuntimeError: the command ended without a step.
    """
    started, seconds = time.perf_counter(), 0.0
    before = {*folder.glob(logs)} - {folder / "plain.log"}
    with (folder / "plain.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while not seconds:
            time.sleep(0.02)
            ended = process.poll() is not None
            if any(b"'loss'" in file.read_bytes() for file in {*folder.glob(logs)} - before):
                seconds = time.perf_counter() - started
            elif ended:
                raise RuntimeError((folder / "plain.log").read_text()[-3000:])
        process.wait()
    return seconds


def start() -> tuple[float, float, float]:
    """Median of the ratios of pairs, and median seconds, of `recipe run` and `axolotl train` to the first step.

    A pair before these tokenizes the rows and reads the packages from the disk.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = config(folder)
        ours: list[str | Path] = [BIN / "recipe", "run", file, "--runs", folder / "runs"]
        theirs: list[str | Path] = [BIN / "axolotl", "train", file]
        pairs = [
            (first_step(ours, folder, "runs/**/train.log"), first_step(theirs, folder, "plain.log"))
            for _ in range(PAIRS + 1)
        ][1:]
    recipe, axolotl = (statistics.median(times) for times in zip(*pairs, strict=True))
    return statistics.median(one / other for one, other in pairs), recipe, axolotl


def machine() -> str:
    """What the figures were measured on and with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("axolotl", "torch"))
    cores = f"{psutil.cpu_count()} cores ({model}), load {os.getloadavg()[0]:.0f}"
    return f"{datetime.now(UTC):%Y-%m-%d}: {cores}, Python {platform.python_version()}, {packages}"


def ratios() -> list[dict[str, str]]:
    """Rows of the README's table."""
    with tempfile.TemporaryDirectory() as name, patch.dict(os.environ, XDG_CACHE_HOME=name):  # no plan is kept there
        first, imports = plan()
    (few, small, size), (many, large, sizes) = (preparation(count) for count in (250_000, 1_000_000))
    ratio, ours, theirs = start()
    measured = [
        ("a first plan of 7B", "its imports", first / imports, f"{first:.1f} s of processor time"),
        (
            "a prepared row of 1,000,000",
            "one of 250,000",
            many / sizes / (few / size),
            f"{large / small:.2f} times the memory, {large:.0f} MiB; {sizes / many:.0f} MB/s",
        ),
        ("`recipe run` to the first step", "`axolotl train`", ratio, f"{ours:.1f} s, {theirs:.1f} s"),
    ]
    return [
        {"what": what, "over": over, "ratio": f"{ratio:.2f}", machine(): more} for what, over, ratio, more in measured
    ]


if __name__ == "__main__":
    for arguments in COMMANDS:
        words = "check, all recipes" if arguments == ["check"] else arguments[0]
        took = beyond([str(BIN / "recipe"), *arguments])
        slow = took > QUICK and words in ("list", "show", "results")
        print(f"{words:20}{took:6.3f} s beyond an empty interpreter{', MORE than it may' if slow else ''}")
    print(f"{'a completion':20}{beyond([str(BIN / 'recipe')], **COMPLETION):6.3f} s beyond an empty interpreter")
    with patch.dict(os.environ, OFFLINE):
        tables.print_markdown(ratios())
