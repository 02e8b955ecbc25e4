"""Messages and progress of a command, on stderr."""

import sys
import time
from pathlib import Path
from typing import Any, Self

import orjson


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then, as suits a log file."""

    EVERY = 30.0  # seconds between two lines

    def __init__(self, title: str, total: int | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.progress.add_task(title, total=total, note="")
        self.task = self.progress.tasks[0]
        self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        if self.progress.disable and self.task.completed:
            self._line()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set how far the work is."""
        self.progress.update(self.task.id, completed=done, total=total or None, note=note or self.task.fields["note"])
        if self.progress.disable and time.monotonic() - self.last_line > self.EVERY:
            self._line()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False)

    def _line(self) -> None:
        self.last_line = time.monotonic()
        say(f"{self.task.description} {self.task.completed}/{self.task.total or '?'}  {self.task.fields['note']}")


class TrainingProgress(Bar):
    """The bar of a training process, updated from the metrics that it appends to a file."""

    def __init__(self, metrics: Path):
        super().__init__("training")
        self.metrics = metrics
        self.position = metrics.stat().st_size if metrics.exists() else 0

    def read(self) -> None:
        """Read what was appended since the last call."""
        if not self.metrics.exists() or self.metrics.stat().st_size == self.position:
            return
        with self.metrics.open("rb") as stream:
            stream.seek(self.position)
            whole = b"".join(line for line in stream if line.endswith(b"\n"))
        self.position += len(whole)
        for line in filter(None, whole.split(b"\n")):
            record = orjson.loads(line)
            if "eval_loss_per_token" in record:
                self.say(f"  step {record['step']}: eval loss {_number(record['eval_loss_per_token'], '.3f')}")
            elif "eval_loss" in record:
                self.say(f"  step {record['step']}: Axolotl's eval loss {_number(record['eval_loss'], '.3f')}")
            elif "loss" in record:
                note = f"loss {_number(record['loss'], '.3f')}  rate {_number(record.get('learning_rate'), '.2e')}"
                self.update(record["step"], record["max_steps"], note)


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)  # JSON has null for NaN
