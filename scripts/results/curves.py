"""The training loss that was published of a recipe, and a run's own over the same steps."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..base.errors import UserError
from ..data.published import Published
from ..data.study import Study

Point = tuple[int, float]  # a step, and the mean loss of the steps since the point before


def published(of_study: Study, of_recipe: Published) -> list[Point]:
    """The published curve of a recipe; none where it has none.

    Raises:
        UserError: its file is not a CSV file with numbers in the columns step and train_loss.
    """
    if not of_recipe.curve:
        return []
    file = of_study.folder / of_recipe.curve
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [(int(row["step"]), float(row["train_loss"])) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        problem = f"expected the columns step and train_loss with a number in each row ({error!r:.60})"
        raise UserError(f"{file}: {problem}") from None


def gap(ours: Sequence[Point], curve: Sequence[Point]) -> dict[str, float | int | None]:
    """How far a run's points lie from those of a curve at the same steps: `mean`, ours less theirs; `largest`, of the
    absolute values, and the `step` with that. None where there is no point."""
    theirs = dict(curve)
    gaps = {step: loss - theirs[step] for step, loss in ours}
    furthest = max(gaps, key=lambda step: abs(gaps[step]), default=None)
    return {
        "mean": sum(gaps.values()) / len(gaps) if gaps else None,
        "largest": None if furthest is None else abs(gaps[furthest]),
        "step": furthest,
    }


def over_the_same_steps(metrics: Iterable[Mapping[str, Any]], curve: Sequence[Point]) -> list[Point]:
    """A run's training loss at the steps of a curve: the mean since the step before; without those it has not reached.

    Args:
        metrics: the run's records by step.
        curve: the published points.
    """
    losses = [(record["step"], record["loss"]) for record in metrics if record.get("loss") is not None]
    last = max((step for step, _ in losses), default=0)
    points = []
    for before, step in pairwise([0, *(step for step, _ in curve)]):
        within = [loss for at, loss in losses if before < at <= step]
        if within and step <= last:
            points.append((step, sum(within) / len(within)))
    return points
