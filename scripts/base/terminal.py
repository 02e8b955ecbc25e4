"""Messages and progress of a command, on stderr, without secrets; its environment."""

import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, Self

import orjson
import typer

from .errors import UserError
from .files import Row, parse_json, reading
from .secrets import masked

QUIET = "QLORA_RECIPES_QUIET"  # set for --quiet, also for child commands
PART = "QLORA_RECIPES_PART"  # set for commands that another command starts; only the outermost suggests next steps


_LOG = logging.getLogger("qlora_recipes")
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def prepare_environment() -> None:
    """Set what torch and CUDA read from the environment, for this process and its children."""
    # torch's threads would wait in busy loops; with other processes running, training is then many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # CUDA numbers GPUs as the driver does
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def require_consent(question: str, yes: bool) -> None:
    """Ask before something that cannot be undone.

    Raises:
        UserError: there is no terminal to ask at, and --yes is not given.
        typer.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("not asked without a terminal", key=question, remedy="add --yes")
    typer.confirm(question, abort=True, err=True)


def harmless(text: str) -> str:
    """Mask secrets; replace control characters, except line ends, with spaces."""
    return _OBEYED.sub(" ", masked(text))


def broken(text: str, width: int) -> Iterator[str]:
    """Make a text harmless, and break it into lines of at most `width` cells.

    A path, a command, or a short remark in parentheses stays in one piece if it fits on a line.
    """
    from rich.cells import cell_len

    spaces = len(text) - len(text.lstrip(" "))
    indent = line = " " * min(spaces, width // 2)  # textwrap never ends with an indent beyond the width
    for word in re.findall(r"[(`][^()`]{1,60}[)`]\S*\s?|\S+\s?|\s", harmless(text.lstrip(" "))):
        fits = cell_len(f"{indent}  {word.rstrip()}") <= width
        for piece in [word] if fits else re.split(r"(?<=[/\s])", word):
            if line.strip() and cell_len(line + piece.rstrip()) > width:
                yield line.rstrip()
                line = f"{indent}  "
            line += piece
    yield from textwrap.wrap(
        line, width, subsequent_indent=f"{indent}  ", drop_whitespace=False, break_on_hyphens=False
    ) or [line]


def columns() -> int:
    """Width of the terminal in cells, at least 20: a collapsed window can have one."""
    return max(get_terminal_size().columns, 20)


def say(text: str, level: int = logging.INFO) -> None:
    """Log a note without secrets; commands show it, see `show_messages`.

    `hub.importing_axolotl` disables other messages below errors, so this one does not go through `Logger.log`.
    """
    if _LOG.getEffectiveLevel() <= level:
        _LOG.handle(_LOG.makeRecord(_LOG.name, level, __file__, 0, masked(text), (), None))


def show_messages() -> None:
    """Show messages on stderr from now on, as the commands do; with --quiet, only problems."""
    if not _LOG.handlers:
        _LOG.addHandler(_Stderr())
    _LOG.setLevel(logging.WARNING if os.environ.get(QUIET) else logging.INFO)
    _LOG.propagate = False  # other handlers of the process would repeat them


class _Stderr(logging.Handler):
    """Handler that writes messages to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        _write(record.getMessage())


def _write(text: str) -> None:
    """Write a text to stderr, wrapped to the terminal's width; ignore a closed stderr."""
    is_command = text.startswith(("next: ", "chat: "))  # unwrapped, for copying
    width = columns() if sys.stderr.isatty() and not is_command else sys.maxsize
    with suppress(OSError):
        for line in text.split("\n"):
            print(*broken(line, width), sep="\n", file=sys.stderr, flush=True)


@cache
def say_once(text: str, level: int = logging.INFO) -> None:
    """Log a line only once per process."""
    say(text, level)


warn = partial(say, level=logging.WARNING)
"""Log a problem."""
warn_once = partial(say_once, level=logging.WARNING)
"""Log a problem only once per process."""


@cache
def _console() -> Any:
    """Console that all bars share, so that nested bars are stacked."""
    from rich.console import Console

    return Console(stderr=True)


class Bar:
    """A progress bar on a terminal; in a log file, a line per phase and every 30 s.

    `total` is None while the amount of work is unknown; `done` is the amount of work finished before the bar starts.
    """

    EVERY = 30.0  # seconds between two lines in a log file

    def __init__(self, title: str, total: int | None = None, done: int = 0):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=_console(),
            disable=not _console().is_terminal or _LOG.level > logging.INFO,
            speed_estimate_period=600,
        )
        self.note = ""
        self.progress.add_task(
            harmless(title), start=total != 1, total=total, completed=done, note=self._note(done, total)
        )
        self.task = self.progress.tasks[0]
        self.last_line = time.monotonic()
        self.lines: set[str] = set()

    def __enter__(self) -> Self:
        self.progress.start()
        if self.task.total is None:
            self._line()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.live.transient = not self.note
        self.progress.stop()
        if self.task.completed:
            self._line(after=1.0)

    def begin(self, title: str) -> None:
        """Show a new phase of the work."""
        self.progress.update(self.task.id, description=harmless(title))
        self._line()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set the amount of finished work."""
        self.note = note or self.note
        amount = total or self.task.total
        self.progress.update(self.task.id, completed=done, total=amount, note=self._note(done, amount))
        self._line(after=self.EVERY)

    def _note(self, done: int, total: float | None) -> str:
        if not total or total <= 1:
            return self.note
        return f"{done}/{total:.0f}  {self.note}".strip()

    def _line(self, after: float = 0.0) -> None:
        line = f"{self.task.description}  {self.task.fields['note']}".rstrip()
        if self.progress.disable and line not in self.lines and time.monotonic() - self.last_line >= after:
            self.last_line = time.monotonic()
            self.lines.add(line)
            left = self.task.time_remaining
            say(f"{line}  left {timedelta(seconds=round(left))}" if left else line)


class TrainingProgress(Bar):
    """Bar of a training process, updated from metrics.jsonl; calls `seen` with each record."""

    def __init__(self, metrics: Path, seen: Callable[[Row], None] = lambda record: None):
        super().__init__("starting Axolotl")
        self.metrics = metrics
        self.seen = seen
        self.position = metrics.stat().st_size if metrics.exists() else 0

    def read(self) -> None:
        """Read the records since the last call."""
        with suppress(FileNotFoundError), reading(self.metrics) as stream:
            stream.seek(self.position)
            lines = [line for line in stream if line.endswith(b"\n")]  # the last one can be unfinished
            self.position += sum(map(len, lines))
            for line in lines:
                with suppress(orjson.JSONDecodeError):  # an unfinished line of a killed process
                    record = parse_json(line)
                    self._show(record)
                    self.seen(record)

    def _show(self, record: Row) -> None:
        phase = record.get("phase")
        if "eval_loss_per_token" in record:
            say(f"  step {record['step']}: eval loss {_number(record['eval_loss_per_token'], '.3f')}")
        elif not phase:
            note = f"loss {_number(record.get('loss'), '.3f')}  rate {_number(record.get('learning_rate'), '.2e')}"
            self.update(record["step"], record["max_steps"], note if "loss" in record else "")
        elif phase != self.task.description:
            self.begin(phase)


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)  # JSON has null for NaN
