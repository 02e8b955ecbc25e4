"""Two hundred launches, of which some are stopped or killed at any moment and some fail, leave nothing but their runs.

The training is that of stand_in/axolotl.py.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SUPPORT

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.machine import is_held
from qlora_recipes.runs.rundir import all_runs

NAME = "haider2024/llama-3.2-3b"
LAUNCHES = int(os.environ.get("LAUNCHES", "200"))
MARK = "LAUNCHED_BY_THIS_TEST"
KEPT = {"config.yaml", "run.json", "metrics.jsonl", "train.log", "output", ".lock"}
PART = re.compile(r"\.config\.yaml\.\w+\.part|\.run\.json\.\w+\.part config\.yaml")  # what SIGKILL leaves of a folder


def launch(number: int, profile: Path, output: Path, chance: random.Random) -> dict[str, Any]:
    """A run with a seed of its own, which ends by itself, fails, or gets a signal."""
    words = ["run", NAME, "--profile", str(profile), "--set", f"seed={number}"]
    made: dict[str, Any] = {"words": words, "said": str(output / str(number)), "environment": {}, "ends": "by itself"}
    match number % 5:
        case 1:
            return made | {"words": [*words, "--set", "lr_scheduler_kwargs={a: 1}"], "ends": "fails"}
        case 2 | 3:
            kind = signal.SIGTERM if number % 2 else signal.SIGKILL
            return made | {"signal": kind, "after": chance.uniform(0.02, 3.0), "ends": kind.name}
    return made


def left_by(mark: str) -> list[psutil.Process]:
    """The processes that the launches have started and left."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if process.environ().get(MARK) == mark else []
    return found


@pytest.mark.long
def test_launches_that_end_in_any_way_leave_only_runs_whose_state_is_true(
    tmp_path: Path, stand_in: Path, tiny_profile: Path
) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance, mark = random.Random(seed), str(tmp_path)
    place, output, temporary, cache = (tmp_path / name for name in ("place", "output", "temporary", "cache"))
    for folder in (place, output, temporary, cache):
        folder.mkdir()
    launches = [launch(number, tiny_profile, output, chance) for number in range(LAUNCHES)]
    env = {MARK: mark, "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache), "STAND_IN_STEP": "0.02"}
    command = [stand_in.with_name("python"), SUPPORT / "launch_many.py"]
    done = subprocess.run(
        command, cwd=place, input=json.dumps(launches), capture_output=True, text=True, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    deadline = time.monotonic() + 60
    while left := left_by(mark):  # a training whose command was killed stops at a checkpoint
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    runs = {yamlfiles.read_yaml(run.config)["seed"]: run for run in all_runs(place / "runs")}
    unrecorded = 0
    for number, (launched, code) in enumerate(zip(launches, codes, strict=True)):
        run, how = runs.get(number), launched["ends"]
        text = Path(launched["said"]).read_text() if number else ""
        assert "launch_many.py" not in text, text  # a traceback of the command's own
        state = run.read().state if run else "none"
        if state == "created":  # until it is ten seconds old, it may yet be about to start
            assert how in ("SIGTERM", "SIGKILL")
            state = "interrupted"
        unrecorded += state == "none"
        assert state != "finished" or (run and (run.output / "adapter_model.safetensors").is_file())
        assert state in {"by itself": ["finished"], "fails": ["failed"]}.get(how, ["none", "interrupted", "finished"])
        assert code in {"by itself": [0], "fails": [1], "SIGTERM": [0, 1, 143, -15]}.get(how, [0, -9]), text
    locks = [*tmp_path.rglob("*lock")]
    assert locks and not [lock for lock in locks if is_held(lock)]
    assert [*temporary.rglob("*"), *cache.rglob("*.part*")] == []
    for number, run in runs.items():
        if codes[number] == -signal.SIGKILL:  # perhaps while it wrote run.json anew, which its next holder removes
            with run.held():
                pass
        assert {path.name for path in run.path.iterdir()} <= KEPT, number
    begun = {folder for folder in (place / "runs" / NAME).iterdir()} - {run.path for run in runs.values()}
    for folder in begun:  # of a command that a signal ended before its run had a record
        names = {path.name for path in folder.iterdir()}
        assert names <= {"config.yaml"} or PART.fullmatch(" ".join(sorted(names))), names
    assert len(begun) <= unrecorded
