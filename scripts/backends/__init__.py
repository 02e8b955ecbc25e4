"""Backends of runs' commands: this machine, or SLURM's queue."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..checks.finding import Finding
from ..runs.records import JobState, Run
from ..runs.rundir import RunDir

if TYPE_CHECKING:
    from .local import Local
    from .slurm import Slurm

type Backend = "Local | Slurm"


def relevant(backend: Backend, found: Iterable[Finding]) -> list[Finding]:
    """Findings of a check that hold at a backend; a cluster does not need a GPU on this machine."""
    return [finding for finding in found if backend.here or finding.scope != "machine"]


def read(folder: RunDir) -> Run:
    """The record of a run with its current state, wherever it is trained or queued.

    Raises:
        UserError: run.json is missing, or it or jobs.json damaged.
    """
    return folder.read(job_state(folder, "run"))


def job_state(folder: RunDir, step: str, words: Sequence[str] | None = None) -> JobState | None:
    """State of the job that carries out a command of a run; None without a job.

    Args:
        folder: the run.
        step: what the command does.
        words: its arguments, where only a job with these is meant.

    Raises:
        UserError: jobs.json is damaged.
    """
    jobs = [job for job in folder.jobs() if job.step == step and words in (None, job.words)]
    if not jobs:
        return None
    from .slurm_site import active

    states = active(jobs)
    return JobState("unknown") if states is None else next(iter(states.values()), None)
