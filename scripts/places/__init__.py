"""Where the commands of runs are carried out: this machine, or a cluster's queue.

A further place is one more module with a class that does what `Place` says, and a name for it in `kinds`.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

from ..checks.finding import Finding
from ..configs.gpus import Gpu
from ..runs.rundir import Job, JobState, Run, RunDir
from ..runs.tasks import Work


class Place(Protocol):
    """Somewhere that commands of runs are carried out."""

    here: bool  # whether it is this machine

    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str]): ...

    def gpu(self) -> Gpu | None:
        """The GPU that runs get there; None where there is none, or it is not known."""

    def submit(self, works: Sequence[Work], title: str, runs: Path, results: list[str]) -> None:
        """Carry works out, or hand them over to be carried out; what becomes of each is noted in its outcome.

        Args:
            works: each goes on alone, and one that fails does not keep the others from going on.
            title: what they are together, in a word or two.
            runs: the folder with the runs.
            results: the command that shows what they came to, for a place where nobody waits for that.

        Raises:
            UserError: the place refuses them; nothing was started.
        """

    @classmethod
    def active(cls, jobs: Sequence[Job]) -> dict[str, JobState] | None:
        """Those of some jobs that are there, by their ids; None where that is not known."""

    @classmethod
    def log(cls, folder: RunDir, step: str) -> Path:
        """The file with what a command of a run says there."""

    @classmethod
    def cancel(cls, folder: RunDir, jobs: Sequence[Job]) -> list[str]:
        """Ask what is going on there for a run to end, and whatever of its jobs is there; what was asked, in words."""


def kinds() -> dict[str, type[Place]]:
    """The classes of places by their names, this machine last.

    One is made of whether a rehearsal is to run, how many works at a time, and options for it alone.
    """
    from .local import Local
    from .slurm import Slurm

    return {"slurm": Slurm, "local": Local}


def relevant(place: Place, found: Iterable[Finding]) -> list[Finding]:
    """The findings of a check that hold at a place: elsewhere, this machine's lack of a GPU is none."""
    return [finding for finding in found if place.here or finding.scope != "machine"]


def read(folder: RunDir) -> Run:
    """The record of a run, with the state that holds now, wherever it is trained or waits for that.

    Raises:
        UserError: run.json is missing or damaged.
    """
    return folder.read(job_state(folder, "run") if folder.jobs() else None)


def job_state(folder: RunDir, step: str, words: Sequence[str] | None = None) -> JobState | None:
    """The state of the job that carries out a command of a run; None where there is none.

    Args:
        folder: the run.
        step: what the command does.
        words: its words, where only one of those that do so is meant.
    """
    jobs = [job for job in folder.jobs() if job.step == step and words in (None, job.words)]
    known = active(jobs)
    if known is None:
        return JobState("unknown")
    return next((known[job.id] for job in jobs if job.id in known), None)


def active(jobs: Iterable[Job]) -> dict[str, JobState] | None:
    """Those of some jobs that are not at their end, as `Place.active` has them; None where that is not known."""
    found: dict[str, JobState] = {}
    for name, of_place in groupby(sorted(jobs, key=lambda job: job.place), key=lambda job: job.place):
        mine = list(of_place)
        every = kinds()[name].active(mine)
        if every is None:
            return None
        found |= {job.id: every[job.id] for job in mine if job.id in every}
    return found


def cancel(folder: RunDir, together: bool) -> list[str]:
    """Ask whatever is queued or going on for a run to end; what was asked, in words.

    Args:
        folder: the run.
        together: whether those that were begun with it are to end too, so that there will be no results to show.
    """
    jobs = [job for job in folder.jobs() if together or job.step != "results"]
    return [asked for kind in kinds().values() for asked in kind.cancel(folder, jobs)]
