"""Runs of trackers: where a training is recorded, and scores added to it."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Literal, NotRequired, TypedDict

from pydantic import with_config

from ..base.errors import first_line
from ..base.terminal import warn
from ..metrics.metric import ScoreRecord

Tracker = Literal["mlflow", "tensorboard", "trackio", "wandb"]
"""Trackers in records; versions up to 2.0 also recorded MLflow's and Trackio's."""


@with_config(extra="forbid", strict=True)
class TrackedRun(TypedDict):
    """A run in a tracker.

    Attributes:
        place: folder of the tracker's files.
        project: project or experiment; empty for TensorBoard.
        run: the tracker's id, or name, of the run; empty for TensorBoard.
        page: address of the run's page.
    """

    tracker: Tracker
    place: str
    project: str
    run: str
    page: NotRequired[str]


def tracked_runs(trackers: Sequence[str]) -> list[TrackedRun]:
    """Runs that this process writes with some of transformers' trackers."""
    runs = [read() for tracker, read in _READERS.items() if tracker in trackers]
    return [run for run in runs if run]


def add_scores(runs: Sequence[TrackedRun], scores: Mapping[str, ScoreRecord]) -> None:
    """Add scores to the tracker runs of a training, as `test/NAME`; a tracker that fails is reported."""
    values = {f"test/{name}": score.value for name, score in scores.items() if score.value is not None}
    for run in runs:
        write = _WRITERS.get(run["tracker"])
        try:
            if write:
                with redirect_stdout(sys.stderr):  # stdout has the scores
                    write(run, values)
        except Exception as error:  # servers, stores and packages can raise any exception
            warn(f"  {run['tracker']}: the scores were not added to {run['place']}: {first_line(error)}")


def _read_wandb() -> TrackedRun | None:
    import wandb

    if wandb.run is None:
        return None
    run: TrackedRun = {
        "tracker": "wandb",
        "place": os.environ["WANDB_DIR"],
        "project": wandb.run.project,
        "run": wandb.run.id,
    }
    if wandb.run.url:  # none for a run without a server
        run["page"] = wandb.run.url
    return run


def _write_wandb(run: TrackedRun, values: Mapping[str, float]) -> None:
    import wandb

    mode: Literal["online", "offline"] = "online" if "page" in run else "offline"
    settings = wandb.Settings(silent=True)
    project, id = run["project"], run["run"]
    with wandb.init(project=project, id=id, resume="allow", dir=run["place"], mode=mode, settings=settings) as added:
        added.log(dict(values))


def _read_tensorboard() -> TrackedRun | None:
    place = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return {"tracker": "tensorboard", "place": place, "project": "", "run": ""} if place else None


def _write_tensorboard(run: TrackedRun, values: Mapping[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run["place"]) as writer:
        for name, value in values.items():
            writer.add_scalar(name, value)


_READERS: dict[str, Callable[[], TrackedRun | None]] = {"tensorboard": _read_tensorboard, "wandb": _read_wandb}
_WRITERS: dict[str, Callable[[TrackedRun, Mapping[str, float]], None]] = {
    "tensorboard": _write_tensorboard,
    "wandb": _write_wandb,
}
