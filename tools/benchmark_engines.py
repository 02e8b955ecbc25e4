"""How many rows a second each engine generates, for one rehearsal's adapter and the same rows.

`python tools/benchmark_engines.py [ROWS]`, with vLLM where `make vllm` has installed it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
from benchmark_start import OFFLINE

from qlora_recipes.base.quiet import importing_axolotl
from qlora_recipes.data.sample import usual_sample
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores.task import EvaluationRequest, EvaluationTask

BIN = Path(sys.executable).parent


def rehearsal(folder: Path) -> RunDir:
    """A run of two steps, whose adapter is of the first study's shape."""
    command = [BIN / "recipe", "run", "haider2024/code-llama-7b", "--rehearse", "--set", "max_steps=2"]
    subprocess.run([*command, "--runs", folder], check=True, capture_output=True)
    return RunDir(next(folder.glob("*/*/*/run.json")).parent)


def rows_of(folder: Path, count: int) -> Path:
    """So many of the sample's rows, from the first again after the last."""
    rows = [row for name in ("train", "valid", "test") for row in (usual_sample() / f"{name}.jsonl").open("rb")]
    file = folder / "rows.jsonl"
    file.write_bytes(b"".join(orjson.dumps(orjson.loads(rows[i % len(rows)])) + b"\n" for i in range(count)))
    return file


def engines(folder: Path, count: int) -> Iterator[tuple[str, float, int]]:
    """For each engine rows a second of wall time, without its start, and how many answers are those of the one before:
    transformers on 4-bit weights, 16 rows at a time, with keys and values copied for each head; the reference; vLLM."""
    run = rehearsal(folder)
    task = EvaluationTask(run, EvaluationRequest(data=rows_of(folder, count)))
    with importing_axolotl(offline=True):
        from qlora_recipes.scores.engines import reference, vllm
        from qlora_recipes.scores.prompter import Prompter

        prompter = Prompter(task.settings, task.cfg, run.output)
        prompts = [example.prompt for example in prompter.examples(task.rows.rows)]
        former: list[str] = []

        def measured(engine: Any) -> tuple[float, int]:
            started = time.perf_counter()
            answers = {i: answer.text for some in engine.generate(prompts, ()) for i, answer in some.items()}
            speed = count / (time.perf_counter() - started)
            texts = [answers[i] for i in range(count)]
            equal = sum(one == other for one, other in zip(former, texts, strict=False))
            former[:] = texts
            return speed, equal

        usual = patch.multiple(reference, SMALL=0, grouped=lambda device: nullcontext())
        for name, how in (("transformers on 4-bit weights", usual), ("the reference", nullcontext())):
            with how:
                engine = reference.Reference(prompter)
                yield name, *measured(engine)
                engine.free()
        if vllm.ENVIRONMENT.is_dir():
            with vllm.started(prompter, prompts, folder / "part") as engine:
                yield "vLLM", *measured(engine)


if __name__ == "__main__":
    os.environ |= OFFLINE
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as name:
        for engine, speed, equal in engines(Path(name), rows):
            print(f"{engine:32}{speed:6.2f} rows/s, {equal} of {rows} answers as the one before", flush=True)
