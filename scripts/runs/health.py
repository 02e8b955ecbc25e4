"""Trouble of a training that goes on: a loss that is no number, or one that diverges."""

from collections.abc import Iterable
from statistics import median
from typing import Any

_WINDOW = 10  # losses of one median


class Watch:
    """Follows the records of metrics.jsonl, phases included, as they come.

    Attributes:
        losses: what is wrong with the losses; None where nothing is. A training diverges where the median of ten of
            them is above that of the first ten, and twice the least.
    """

    def __init__(self) -> None:
        self.losses: str | None = None
        self._window: list[float] = []
        self._medians: list[float] = []

    def add(self, record: dict[str, Any]) -> None:
        """Take a record in."""
        if "loss" not in record:
            return
        if record["loss"] is None:  # as JSON has NaN
            self.losses = self.losses or f"the loss is no number (NaN) since step {record['step']}"
            return
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


def of_losses(records: Iterable[dict[str, Any]]) -> str | None:
    """`Watch.losses` after some records."""
    watch = Watch()
    for record in records:
        watch.add(record)
    return watch.losses
