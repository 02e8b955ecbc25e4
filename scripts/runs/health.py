"""What is wrong with a training that goes on: a loss that is no number or diverges, and steps that no longer come."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import orjson

_STALLED = 20  # times the median of what a step took
_LEAST = 60.0  # seconds that are no stall however fast the steps were
_WINDOW = 10  # losses that one median is of


class Watch:
    """Follows the records of metrics.jsonl, phases included, as they come.

    Attributes:
        losses: what is wrong with the losses; None where nothing is. A training diverges where the median of ten of
            them is above that of the first ten, and twice the least.
    """

    def __init__(self) -> None:
        self.losses: str | None = None
        self._last = 0.0  # when the last record came
        self._in_steps = False
        self._seconds: list[float] = []
        self._window: list[float] = []
        self._medians: list[float] = []

    def add(self, record: dict[str, Any]) -> None:
        """Take a record in."""
        self._last = record.get("time") or 0.0
        if phase := record.get("phase"):
            self._in_steps = phase == "training"  # evaluating, saving and loading are none
        if record.get("step_seconds"):
            self._seconds.append(record["step_seconds"])
        if "loss" in record and record["loss"] is None:  # as JSON has NaN
            self.losses = self.losses or f"the loss is no number (NaN) since step {record['step']}"
        elif "loss" in record:
            self._window.append(record["loss"])
            if self.losses and "NaN" in self.losses:
                self.losses = None
            if len(self._window) == _WINDOW:
                self._judge()

    def _judge(self) -> None:
        self._medians.append(now := median(self._window))
        self._window.clear()
        diverges = now > max(2 * min(self._medians), self._medians[0])
        self.losses = f"the loss diverges: now {now:.3g}, and {min(self._medians):.3g} before" if diverges else None

    def stalled(self, now: float) -> str | None:
        """That no step has come for too long, at a time in seconds since 1970; None where all is well."""
        if not self._in_steps or len(self._seconds) < 3:
            return None
        since, usual = now - self._last, median(self._seconds)
        if since <= max(_STALLED * usual, _LEAST):
            return None
        return f"stalled: no step for {since:.0f} s, where one takes {usual:.1f} s; perhaps its data does not arrive"


def of_losses(records: Iterable[dict[str, Any]]) -> str | None:
    """`Watch.losses` after some records."""
    watch = Watch()
    for record in records:
        watch.add(record)
    return watch.losses


def stalled(metrics: Path) -> str | None:
    """`Watch.stalled` of a training that goes on, now, by its metrics.jsonl."""
    watch = Watch()
    with suppress(OSError):
        for line in metrics.read_bytes().splitlines():
            with suppress(ValueError, TypeError, AttributeError, KeyError):
                watch.add(orjson.loads(line))
    return watch.stalled(time.time())
