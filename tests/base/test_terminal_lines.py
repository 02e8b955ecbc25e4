"""Lines of progress in a log."""

import re
from typing import Any

import orjson
import pytest

from qlora_recipes.base import tables, terminal
from qlora_recipes.base.terminal import TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as bars see it; a test sets it."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_one_line_for_each_phase(tmp_path, capsys, clock):
    metrics = tmp_path / "metrics.jsonl"
    records: list[dict[str, Any]] = [
        {"phase": "reading and tokenizing rows"},
        {"phase": "loading the model"},
        {"step": 3, "max_steps": 8},
        {"phase": "training"},
        {"step": 4, "max_steps": 8, "loss": 2.0, "learning_rate": 0.1},
        {"phase": "evaluating"},
        {"step": 4, "max_steps": 8, "eval_loss_per_token": 2.5},
        *({"phase": phase} for phase in ("training", "saving a checkpoint", "training")),
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
        *(f"{phase}  4/8  loss 2.000  rate 1.00e-01" for phase in ("training", "saving a checkpoint")),
    ]


@pytest.mark.parametrize("width", [1, 2, 5, 19, 20, 64])
@pytest.mark.parametrize("indent", [0, 3, 300])
def test_a_collapsed_window_ends_nothing(capsys, monkeypatch, width, indent):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    text = " " * indent + "abc def/ghi 你好 " + "x" * 50
    terminal.say(text)
    tables.print_table([{"run": text, "at": "a long text", "other": 1.5}], "A title", ["at"])
    captured = capsys.readouterr()
    for stream in (captured.out, captured.err):
        shown = re.sub(r"\x1b\[[0-9;]*m|\s", "", stream)
        assert "abcdef/ghi你好" + "x" * 50 in shown
    assert max(map(len, captured.err.splitlines())) <= max(width, 20)


def test_a_command_or_a_remark_that_fits_on_a_line_is_not_broken():
    assert [*terminal.broken("ab cd `ef gh` (ij kl)", 9)] == ["ab cd", "  `ef gh`", "  (ij kl)"]
