"""What a command says while it works, on stderr."""

import sys
import time
from pathlib import Path
from typing import Any, Self

import orjson


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then, which is what a log file can hold."""

    EVERY = 30.0  # seconds between two lines

    def __init__(self, title: str, total: int | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.title, self.total, self.done, self.note = title, total, 0, ""
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console) if self.console.is_terminal else None
        self.task = self.progress.add_task(title, total=total, note="") if self.progress else None
        self.last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.progress:
            self.progress.stop()
        elif self.done:
            self._line()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Set how far the work is."""
        self.done, self.total, self.note = done, total or self.total, note or self.note
        if self.progress and self.task is not None:
            self.progress.update(self.task, completed=done, total=self.total, note=self.note)
        elif time.monotonic() - self.last_line > self.EVERY:
            self._line()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False)

    def _line(self) -> None:
        self.last_line = time.monotonic()
        say(f"{self.title} {self.done}/{self.total or '?'}  {self.note}")


class TrainingProgress(Bar):
    """The bar of a training process, fed from the metrics that it appends to a file."""

    def __init__(self, metrics: Path):
        super().__init__("training")
        self.metrics = metrics
        self.position = metrics.stat().st_size if metrics.exists() else 0

    def read(self) -> None:
        """Take in what was appended since the last time."""
        if not self.metrics.exists() or self.metrics.stat().st_size == self.position:
            return
        with self.metrics.open("rb") as stream:
            stream.seek(self.position)
            whole = b"".join(line for line in stream if line.endswith(b"\n"))
        self.position += len(whole)
        for line in filter(None, whole.split(b"\n")):
            record = orjson.loads(line)
            if "eval_loss" in record or "eval_loss_per_token" in record:
                ours = "eval_loss_per_token" in record
                name, key = ("eval loss", "eval_loss_per_token") if ours else ("Axolotl's eval loss", "eval_loss")
                self.say(f"  step {record['step']}: {name} {_number(record[key], '.3f')}")
            elif "loss" in record:
                note = f"loss {_number(record['loss'], '.3f')}  rate {_number(record.get('learning_rate'), '.2e')}"
                self.update(record["step"], record["max_steps"], note)


def _number(value: float | None, form: str) -> str:
    """A number of the metrics; JSON has null for one that is none."""
    return "nan" if value is None else format(value, form)
