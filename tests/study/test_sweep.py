"""A sweep over a tiny Llama through the command: stopped, started again, and compared.

A fake Axolotl trains its trials; their evaluations are real.
"""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import RECIPE, wait_until

from qlora_recipes.base import yamlfiles
from qlora_recipes.run import rundir

pytestmark = pytest.mark.long

BASE = "haider2024/code-llama-7b"
MEMBERS = [
    {"name": "low", "lora_r": 4},
    {"name": "high", "lora_r": 8},
    {"name": "broken", "lr_scheduler_kwargs": {"nonsense": 1}},
]


def command(recipe: Path, profile: Path, *more: str) -> list[str]:
    fixed = ["--profile", str(profile), "--limit", "4", "--metric", "bertscore:none"]
    return [str(recipe), "sweep", BASE, "s.yaml", *fixed, "--json", *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "s.yaml").write_text(yamlfiles.write_yaml({"_": MEMBERS}))
    return folder


def stop(process: "subprocess.Popen[bytes]", place: Path, how: str) -> None:
    if how.startswith("SIG"):
        process.send_signal(signal.Signals[how])
        return
    done = subprocess.run([RECIPE, "cancel", how], cwd=place, capture_output=True, text=True)
    assert re.findall(r"process (\d+)", done.stdout) == [str(process.pid)], done.stderr


@pytest.fixture(scope="module")
def finished(place: Path, tiny_profile: Path, fake_axolotl: Path) -> dict[str, Any]:
    """Output of a sweep that was stopped in one of these ways while it trained a trial, and then ran to its end."""
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    held = os.environ | {"FAKE_STEP": "0.02", "FAKE_HOLD": "3"}  # of sixteen steps
    with (place / "said").open("w") as said:
        process = subprocess.Popen(command(fake_axolotl, tiny_profile), cwd=place, env=held, stderr=said)
    wait_until(lambda: [run for run in rundir.all_runs(place / "runs" / BASE) if run.read().launches], process)
    time.sleep(chance.uniform(0, 0.5))
    assert process.poll() is None
    stop(process, place, chance.choice(("SIGKILL", "SIGTERM", "s", "haider2024")))
    process.wait(120)
    (run,) = rundir.all_runs(place / "runs" / BASE)
    wait_until(lambda: run.read().state != "running")  # ends by itself when the sweep was killed
    assert run.read().state == "interrupted"
    assert len(run.read().launches) == 1
    done = subprocess.run(command(fake_axolotl, tiny_profile), cwd=place, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # for the trial that fails
    assert re.findall(r"(\d) of 3, (\w+): ", done.stderr)[-2:] == [("2", "high"), ("3", "broken")]
    assert "recipe resume" not in done.stderr
    assert "next:" not in done.stderr
    return orjson.loads(done.stdout)


def test_killed_and_started_again_it_has_its_trials_and_none_ran_twice(place, finished):
    assert [step["trial"] for step in finished["steps"]] == [trial["name"] for trial in MEMBERS]
    assert [step["problem"] for step in finished["steps"][:2]] == [None, None]
    assert finished["steps"][2]["problem"]
    records = [folder.read() for folder in rundir.all_runs(place / "runs" / BASE)]
    done = [record for record in records if record.state == "finished"]
    assert len({record.digest for record in done}) == len(done) == 2
    assert sorted(len(record.launches) for record in done) == [1, 2]


def test_its_trials_compare_and_one_that_failed_has_nothing(finished):
    low, high, broken = finished["results"]
    assert [row["trial"] for row in (low, high, broken)] == ["low", "high", "broken"]
    for row in (low, high):
        assert row["bleu4"] is not None
        assert row["eval_loss"] > 0
        assert row["peak_memory_gib"] > 0
        assert row["planned_gib"] > 0
    assert broken["bleu4"] is None
    assert broken["eval_loss"] is None
    assert broken["pareto"] is False
    assert any(row["pareto"] for row in (low, high))
