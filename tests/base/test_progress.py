"""What is shown of work while it goes on: on a terminal of 80 columns, and in a log."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import orjson
import pytest

from qlora_recipes.base import progress
from qlora_recipes.base.progress import Bar, TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as bars see it; a test sets it."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def on_terminal(place: Path, *words: str | Path, columns: int = 80, **env: str) -> str:
    """What a command writes to a terminal on stderr; it ends with code 0."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": "xterm"} | env
    process = subprocess.Popen([*map(str, words)], cwd=place, env=env, stdout=subprocess.PIPE, stderr=its)
    os.close(its)
    shown = b""
    try:
        while some := os.read(ours, 65536):
            shown += some
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode()


def test_a_training_is_one_line_of_a_terminal_that_names_its_phase(
    tmp_path: Path, tiny_profile: Path, stand_in: Path
) -> None:
    words = (stand_in, "run", "haider2024/code-llama-7b", "--profile", tiny_profile)
    shown = on_terminal(tmp_path, *words, STAND_IN_STEP="0.05", NO_COLOR="1")
    shown = shown[shown.index("starting ") :]
    assert "\x1b[1A" not in shown  # no bar was longer than a line, which would have the cursor go up
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    bars = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if "━" in line or "╸" in line]
    assert all(len(bar) <= 80 for bar in bars), bars
    assert bars[0].startswith("starting Axolotl ")
    trained = [bar for bar in bars if bar.startswith("training ")]
    assert any(re.search(r" \d+/16  loss 0\.\d{3}  rate 1.00e-04", bar) for bar in trained), bars
    assert bars[-1].startswith("saving ") and " 16/16  loss " in bars[-1]
    (run,) = (tmp_path / "runs").glob("*/*/*")
    assert plain.endswith(f" {run.name}\r\n")


def test_a_log_has_a_line_for_each_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records: list[dict[str, Any]] = [
        {"phase": "reading and tokenizing rows"},
        {"phase": "loading the model"},
        {"step": 3, "max_steps": 8},
        {"phase": "training"},
        {"step": 4, "max_steps": 8, "loss": 2.0, "learning_rate": 0.1},
        {"phase": "evaluating"},
        {"step": 4, "max_steps": 8, "eval_loss_per_token": 2.5},
    ]
    with TrainingProgress(metrics) as bar:
        for record in records:
            clock[0] += 5
            with metrics.open("ab") as stream:
                stream.write(orjson.dumps(record) + b"\n")
            bar.read()
    assert [line.partition("  left")[0] for line in capsys.readouterr().err.splitlines()] == [
        "starting Axolotl",
        "reading and tokenizing rows",
        "loading the model",
        "training  3/8",
        "evaluating  4/8  loss 2.000  rate 1.00e-01",
        "  step 4: eval loss 2.500",
    ]


def test_quick_work_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    for seconds in (0.1, 10):
        with Bar("tokenizing", total=2) as bar:
            clock[0] += seconds
            bar.update(2)
    assert capsys.readouterr().err == "tokenizing  2/2\n"
