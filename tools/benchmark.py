"""Times of quick commands, a plan, the preparation of data and the start of a training run.

`make benchmark` runs this module. Each ratio compares two times that were measured one after the other. The last lines
that it prints are the table in CONTRIBUTING.md.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import random_models
import run_folders
from markdown_table import print_markdown

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.data.prepare import default_sample

BIN = Path(sys.executable).parent
COMMANDS = (
    *("list", "show haider2024/llama-2-7b", "diff haider2024/llama-2-7b haider2024/llama-3-8b"),
    *("check haider2024/llama-2-7b", "check", "render --check", "results"),
)
COMPLETION = {"_RECIPE_COMPLETE": "complete_bash", "COMP_WORDS": "recipe run code", "COMP_CWORD": "2"}
OFFLINE = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
RUNS = 500
PAIRS = 5
PLANNED = ("haider2024/code-llama-7b", "haider2024/llama-3.2-3b", "litgpt-alpaca2k/mistral-7b-qlora")
IMPORTS = "import bitsandbytes, peft, torch, transformers; transformers.AutoModelForCausalLM"  # what a plan needs
PREPARE = """
import pathlib, sys, time
from qlora_recipes.data import prepare, studies
file = pathlib.Path(sys.argv[1])
prepare.prepare([file], file.with_suffix(".out"), studies.find("haider2024"), "diff")
print(time.process_time(), open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def seconds(command: Sequence[str | Path], **env: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=os.environ | env, capture_output=True)
    return time.perf_counter() - started


def beyond(*words: str, **env: str) -> float:
    """Median of the seconds that a command takes beyond an empty interpreter."""
    empty = [sys.executable, "-c", ""]
    return statistics.median(seconds([BIN / "recipe", *words], **env) - seconds(empty) for _ in range(PAIRS))


def measured(program: str, *words: str | Path, **env: str) -> list[float]:
    """The numbers in the last line that a program prints."""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, check=True, text=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def processor_seconds(command: Sequence[str | Path], **env: str) -> float:
    """Processor time of a command and its children, in user and kernel mode."""
    before = os.times()
    subprocess.run(command, env=os.environ | env, capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def first_plans(folder: Path) -> list[tuple[float, float]]:
    """Processor time of first plans, each with that of the imports measured just after it."""
    pairs = []
    for name in PLANNED:
        plan = [BIN / "recipe", "plan", name, "--gpu", "T4", "--set", "lora_r=24"]  # no built-in plan has this rank
        took = processor_seconds(plan, XDG_CACHE_HOME=str(folder / "cache"))
        imports = processor_seconds([sys.executable, "-c", IMPORTS])
        print(f"first plan of {name:41}{took:6.1f} s of processor time; imports alone {imports:.1f} s")
        pairs.append((took, imports))
    return pairs


def preparation(folder: Path, count: int) -> tuple[float, float, float]:
    """Seconds of processor time for a number of raw rows of 2 kB, no two alike, peak memory in MiB, and megabytes."""
    file = folder / "msg-train.jsonl"
    sample = sorted((paths.RECIPES / "haider2024" / "sample").glob("*.jsonl"))
    texts = [json.loads(line) for source in sample for line in source.open()]
    padding = "\n".join(text["patch"] for text in texts * 10)[:1000]
    with file.open("w") as stream:
        for i in range(count):
            text = texts[i % len(texts)]
            stream.write(json.dumps(text | {"id": i, "oldf": padding, "msg": f"{text['msg']} {i}"}) + "\n")
    took, peak = measured(PREPARE, file)
    return took, peak / 1024, file.stat().st_size / 1e6


def config(folder: Path) -> Path:
    """Write a recipe with a tiny model, the sample's rows and one step, without evaluation."""
    random_models.save_tiny_llama(folder / "tiny")
    change = {
        "base_model": str(folder / "tiny"),
        "datasets": [{"path": str(default_sample() / "train.jsonl"), "type": "alpaca"}],
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


def first_step(command: Sequence[str | Path], folder: Path, logs: str) -> float:
    """Seconds until a new log under a folder has the first training step."""
    started, before = time.perf_counter(), {*folder.glob(logs)} - {folder / "plain.log"}
    with (folder / "plain.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while not any(b"'loss'" in file.read_bytes() for file in {*folder.glob(logs)} - before):
            assert process.poll() is None, (folder / "plain.log").read_text()[-3000:]
            time.sleep(0.02)
        took = time.perf_counter() - started
        process.wait()
    return took


def start(folder: Path) -> tuple[float, float, float]:
    """Median of the ratios of pairs, and median seconds, of `recipe run` and `axolotl train` to the first step.

    A pair before these tokenizes the rows and reads the packages from the disk.
    """
    file = config(folder)
    ours, theirs = [BIN / "recipe", "--runs", folder / "runs", "run", file], [BIN / "axolotl", "train", file]
    pairs = [
        (first_step(ours, folder, "runs/**/train.log"), first_step(theirs, folder, "plain.log"))
        for _ in range(PAIRS + 1)
    ][1:]
    recipe, axolotl = (statistics.median(times) for times in zip(*pairs, strict=True))
    return statistics.median(one / other for one, other in pairs), recipe, axolotl


def main() -> None:
    """Print the seconds of quick commands, then CONTRIBUTING.md's table."""
    took = {words: beyond(*words.split()) for words in COMMANDS}
    with tempfile.TemporaryDirectory() as place:
        for number in range(RUNS):
            run_folders.a_run(Path(place), "haider2024/llama-2-7b", str(number), 5.0)
        took[f"results of {RUNS} runs"] = beyond("results", **{paths.RUNS: place})
    took["a completion"] = beyond(**COMPLETION)
    for words, seconds_of in took.items():  # `list`, `show` and `results` should take 0.3 at most
        print(f"{words:55}{seconds_of:6.3f} s beyond an empty interpreter")
    os.environ |= OFFLINE | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # has accelerate, for `axolotl train`
    with tempfile.TemporaryDirectory() as place:
        plans = first_plans(Path(place))
        (few, small, size), (many, large, sizes) = (preparation(Path(place), n) for n in (250_000, 1_000_000))
        ratio, ours, theirs = start(Path(place))
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("axolotl", "torch"))
    machine = f"{datetime.now(UTC):%Y-%m-%d}: {psutil.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, {packages}"
    memory = f"{large / small:.2f} times the memory, {large:.0f} MiB; {sizes / many:.0f} MB/s"
    planned = statistics.median(plan / imports for plan, imports in plans)
    plan_times = f"processor time: {', '.join(f'{plan:.1f} s' for plan, _ in plans)}"
    rows = [
        ("first plan of a model", "importing torch, transformers, PEFT, bitsandbytes", f"{planned:.2f}", plan_times),
        ("preparing a row, with 1,000,000 rows", "with 250,000 rows", f"{many / sizes / (few / size):.2f}", memory),
        ("`recipe run`, until the first step", "`axolotl train`", f"{ratio:.2f}", f"{ours:.1f} s, {theirs:.1f} s"),
    ]
    print_markdown([dict(zip(("time", "divided by", "ratio", machine), row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
