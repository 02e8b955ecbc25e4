"""Runs of trackers: where a training is recorded, and scores added to it."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Literal, NotRequired, TypedDict

from pydantic import with_config

from ..base.errors import first_line
from ..base.secrets import masked
from ..base.terminal import warn
from ..metrics.metric import ScoreRecord

Tracker = Literal["mlflow", "tensorboard", "trackio", "wandb"]


@with_config(extra="forbid", strict=True)
class TrackedRun(TypedDict):
    """A run in a tracker.

    Attributes:
        place: folder, Space or address of the store, without passwords.
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
        try:
            with redirect_stdout(sys.stderr):  # stdout has the scores
                _WRITERS[run["tracker"]](run, values)
        except Exception as error:  # servers, stores and packages can raise any exception
            warn(f"  {run['tracker']}: the scores were not added to {run['place']}: {first_line(error)}")


def _read_mlflow() -> TrackedRun | None:
    import mlflow

    active = mlflow.active_run()
    if active is None:
        return None
    place, info = masked(mlflow.get_tracking_uri()), active.info
    run: TrackedRun = {"tracker": "mlflow", "place": place, "project": info.experiment_id, "run": info.run_id}
    if place.startswith("http"):
        run["page"] = f"{place.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
    return run


def _write_mlflow(run: TrackedRun, values: Mapping[str, float]) -> None:
    from mlflow import MlflowClient

    # the record has no password; the environment can have one
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or run["place"])
    for name, value in values.items():
        client.log_metric(run["run"], name, value)


def _read_trackio() -> TrackedRun | None:
    from trackio import context_vars

    active = context_vars.current_run.get()
    if active is None:
        return None
    space = os.environ.get("TRACKIO_SPACE_ID")
    place = space or os.environ["TRACKIO_DIR"]
    run: TrackedRun = {"tracker": "trackio", "place": place, "project": active.project, "run": active.name}
    if space:
        run["page"] = f"https://huggingface.co/spaces/{space}"
    return run


def _write_trackio(run: TrackedRun, values: Mapping[str, float]) -> None:
    if "page" not in run:
        os.environ["TRACKIO_DIR"] = run["place"]
    import trackio

    space = run["place"] if "page" in run else None
    trackio.init(run["project"], run["run"], space_id=space, resume="must", auto_log_cpu=False, auto_log_gpu=False)
    trackio.log(dict(values))
    trackio.finish()


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


_READERS: dict[Tracker, Callable[[], TrackedRun | None]] = {
    "mlflow": _read_mlflow,
    "tensorboard": _read_tensorboard,
    "trackio": _read_trackio,
    "wandb": _read_wandb,
}
_WRITERS: dict[Tracker, Callable[[TrackedRun, Mapping[str, float]], None]] = {
    "mlflow": _write_mlflow,
    "tensorboard": _write_tensorboard,
    "trackio": _write_trackio,
    "wandb": _write_wandb,
}
