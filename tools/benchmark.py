"""How long things take: quick commands, a plan and the start of a training.

`make benchmark` prints it; the ratios of two times that were measured one after the other are the README's table.
"""

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

from qlora_recipes import tables
from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.data.sample import usual_sample

BIN = Path(sys.executable).parent
COMMANDS = (
    *("list", "show haider2024/llama-2-7b", "diff haider2024/llama-2-7b haider2024/llama-3-8b"),
    *("check haider2024/llama-2-7b", "check", "render --check", "results"),
)
COMPLETION = {"_RECIPE_COMPLETE": "complete_bash", "COMP_WORDS": "recipe run code", "COMP_CWORD": "2"}
QUICK = 0.3
"""Seconds beyond an empty interpreter that `list`, `show` and `results` without runs may take."""
OFFLINE = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
PAIRS = 5
PLAN = """
import time
from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.configs import gpus
from qlora_recipes.planning import layers, plan
imported = time.process_time()
plan.plan(yamlfiles.read_yaml(paths.recipe_file("haider2024/code-llama-7b")), gpus.find("T4"))
print(time.process_time() - imported, imported)
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


def config(folder: Path) -> Path:
    """Write a recipe with a tiny model, the sample's rows and one step, without evaluation."""
    random_models.save_tiny_llama(folder / "tiny")
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
    ours, theirs = [BIN / "recipe", "run", file, "--runs", folder / "runs"], [BIN / "axolotl", "train", file]
    pairs = [
        (first_step(ours, folder, "runs/**/train.log"), first_step(theirs, folder, "plain.log"))
        for _ in range(PAIRS + 1)
    ][1:]
    recipe, axolotl = (statistics.median(times) for times in zip(*pairs, strict=True))
    return statistics.median(one / other for one, other in pairs), recipe, axolotl


def main() -> None:
    """Print the seconds of quick commands, then the README's table."""
    for words in COMMANDS:
        took = beyond(*words.split())
        slow = took > QUICK and words.split()[0] in ("list", "show", "results")
        print(f"{words:55}{took:6.3f} s beyond an empty interpreter{', MORE than it may' if slow else ''}")
    print(f"{'a completion':55}{beyond(**COMPLETION):6.3f} s beyond an empty interpreter")
    os.environ |= OFFLINE | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # has accelerate, for `axolotl train`
    with tempfile.TemporaryDirectory() as place:
        plan, imports = measured(PLAN, XDG_CACHE_HOME=place)  # no plan is kept there
        ratio, ours, theirs = start(Path(place))
    packages = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("axolotl", "torch"))
    machine = f"{datetime.now(UTC):%Y-%m-%d}: {psutil.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, {packages}"
    rows = [
        ("a first plan of 7B", "its imports", f"{plan / imports:.2f}", f"{plan:.1f} s of processor time"),
        ("`recipe run` to the first step", "`axolotl train`", f"{ratio:.2f}", f"{ours:.1f} s, {theirs:.1f} s"),
    ]
    tables.print_markdown([dict(zip(("what", "over", "ratio", machine), row, strict=True)) for row in rows])


if __name__ == "__main__":
    main()
