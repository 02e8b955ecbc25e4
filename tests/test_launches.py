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
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SUPPORT

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.processes import is_held
from qlora_recipes.runs.rundir import all_runs

NAME = "haider2024/llama-3.2-3b"
LAUNCHES = int(os.environ.get("LAUNCHES", "200"))
MARK = "LAUNCHED_BY_THIS_TEST"
PART = re.compile(r"\.config\.yaml\.\w+\.part|\.run\.json\.\w+\.part config\.yaml")  # what SIGKILL leaves of a folder


def launch(number: int, profile: Path, said: Path, chance: random.Random) -> dict[str, Any]:
    """A run with a seed of its own, which ends by itself, fails, or gets a signal."""
    words = ["run", NAME, "--profile", str(profile), "--set", f"seed={number}"]
    made: dict[str, Any] = {"words": words, "said": str(said / str(number)), "environment": {}, "ends": "by itself"}
    match number % 5:
        case 1:
            made["words"] += ["--set", "lr_scheduler_kwargs={a: 1}"]
            made["ends"] = "fails"
        case 2 | 3:
            kind = signal.SIGTERM if number % 2 else signal.SIGKILL
            made |= {"signal": kind, "after": chance.uniform(0.02, 3.0), "ends": kind.name}
    return made


def of_this_test(mark: str) -> list[psutil.Process]:
    """The processes that the launches have started and left."""
    return [process for process in psutil.process_iter() if _environment(process).get(MARK) == mark]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.long
def test_launches_that_end_in_any_way_leave_only_runs_whose_state_is_true(
    tmp_path: Path, stand_in: Path, tiny_profile: Path
) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    place, said, temporary, cache = (tmp_path / name for name in ("place", "said", "temporary", "cache"))
    for folder in (place, said, temporary, cache):
        folder.mkdir()
    launches = [launch(number, tiny_profile, said, chance) for number in range(LAUNCHES)]
    mark = str(tmp_path)
    done = subprocess.run(
        [stand_in.with_name("python"), SUPPORT / "launch_many.py"],
        cwd=place, input=json.dumps(launches), capture_output=True, text=True,
        env=os.environ | {MARK: mark, "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache), "STAND_IN_STEP": "0.02"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    deadline = time.monotonic() + 60
    while left := of_this_test(mark):  # a training whose command was killed stops at a checkpoint
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    runs = {yamlfiles.read_yaml(run.config)["seed"]: run for run in all_runs(place / "runs")}
    ends = Counter()
    for number, (launched, code) in enumerate(zip(launches, codes, strict=True)):
        run, how = runs.get(number), launched["ends"]
        text = Path(launched["said"]).read_text() if number else ""
        assert "launch_many.py" not in text, text  # a traceback of the command's own
        state = run.read().state if run else "none"
        if state == "created":  # until it is ten seconds old, it may yet be about to start
            assert how in ("SIGTERM", "SIGKILL")
            state = "interrupted"
        ends[how, state, code] += 1
        has_adapter = run is not None and (run.output / "adapter_model.safetensors").is_file()
        assert state != "finished" or has_adapter
        assert state in {"by itself": ["finished"], "fails": ["failed"]}.get(how, ["none", "interrupted", "finished"])
        assert code in {"by itself": [0], "fails": [1], "SIGTERM": [0, 1, 143, -15]}.get(how, [0, -9]), text
    for (how, state, code), count in sorted(ends.items()):
        print(f"{count} x {how}: {state}, exit code {code}")
    locks = [*tmp_path.rglob("*lock")]
    assert locks and not [lock for lock in locks if is_held(lock)]
    assert [*temporary.rglob("*")] == []
    assert [*cache.rglob("*.part*")] == []
    kept = {"config.yaml", "run.json", "metrics.jsonl", "train.log", "output", ".lock"}
    for number, run in runs.items():
        left = {path.name for path in run.path.iterdir()}
        if codes[number] == -signal.SIGKILL:  # perhaps while it wrote run.json anew
            with run.held():
                left = {path.name for path in run.path.iterdir()}
        assert left <= kept, (number, left)
    begun = {folder for folder in (place / "runs" / NAME).iterdir()} - {run.path for run in runs.values()}
    for folder in begun:  # of a command that a signal ended before its run had a record
        left = {path.name for path in folder.iterdir()}
        assert left <= {"config.yaml"} or PART.fullmatch(" ".join(sorted(left))), left
    assert len(begun) <= sum(count for (how, state, _), count in ends.items() if state == "none")
    assert {part.parent for part in place.rglob("*.part")} <= begun
