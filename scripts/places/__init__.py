"""Where the commands of runs are carried out: this machine, a cluster's queue, or machines that SkyPilot finds.

Another place is one more module, with a class that implements `Place`, and an entry in `kinds`.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ..base.errors import UserError
from ..checks.finding import Finding
from ..configs.gpus import Gpu
from ..runs.rundir import Job, JobState, Run, RunDir, this_job
from ..runs.tasks import Command, Outcome, Work


class Place(Protocol):
    """Somewhere that commands of runs are carried out."""

    here: bool  # whether it is this machine

    @property
    def installs(self) -> bool:
        """Whether its machines install environments of their own."""

    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str]): ...

    def gpu(self) -> Gpu | None:
        """The GPU that runs get there; None where there is none, or it is not known."""

    def check_size(self, gpus: int, nodes: int) -> None:
        """Refuse a run on more GPUs, or nodes, than can be had there, as far as that is known before submitting it.

        Raises:
            UserError: it is too big.
        """

    def carry_out[T](self, work: Work, title: str, runs: Path, here: Callable[[], T]) -> T | RunDir:
        """Carry out one work: in this process, by calling `here`, or as a job.

        Returns:
            What `here` returns, or the run's folder once the work is queued.

        Raises:
            UserError: the place refuses it; nothing was started.
        """

    def submit(self, works: Sequence[Work], title: str, runs: Path, results: list[str]) -> None:
        """Carry out several works, or queue them; the result of each is noted in its outcome.

        Args:
            works: each is independent of the others: one that fails does not keep them from being carried out.
            title: what they are together, in a word or two.
            runs: the folder with the runs.
            results: the arguments of `recipe` that show the results, for a place where nobody waits for them.

        Raises:
            UserError: the place refuses them; nothing was started.
        """

    def can_follow(self, job: JobState | None) -> bool:
        """Whether an evaluation can be queued there behind the job that trains its run."""

    @classmethod
    def active(cls, jobs: Sequence[Job]) -> dict[str, JobState] | None:
        """The states of those jobs that have not ended, by id; None where that cannot be determined."""

    @classmethod
    def cancel(cls, folder: RunDir, jobs: Sequence[Job]) -> list[str]:
        """Ask what is running there for a run to stop, and cancel its jobs; a message for each."""


def kinds() -> dict[str, type[Place]]:
    """The classes of places by name, this machine last.

    The arguments: whether a rehearsal is to run, how many works to carry out at a time, and the place's own options.
    """
    from .local import Local
    from .sky import Sky
    from .slurm import Slurm

    return {"slurm": Slurm, "sky": Sky, "local": Local}


def claim(works: Sequence[Work]) -> list[tuple[Outcome, list[Command]]]:
    """The commands of works, whose folders are claimed by that; a work that is refused has failed."""
    claimed = []
    for work in works:
        try:
            claimed.append((work.outcome, work.commands()))
        except UserError as error:
            work.outcome.fail("run", str(error))
    return claimed


def relevant(place: Place, found: Iterable[Finding]) -> list[Finding]:
    """The findings of a check that hold at a place: elsewhere, this machine's lack of a GPU is none."""
    return [finding for finding in found if place.here or finding.scope != "machine"]


def read(folder: RunDir) -> Run:
    """The record of a run with its current state, wherever it is trained or queued.

    Raises:
        UserError: run.json is missing, or it or jobs.json damaged.
    """
    if not (jobs := folder.jobs()):
        return folder.read()
    state = job_state(folder, "run")
    active([job for job in jobs if job.step != "run"])  # which has what these left elsewhere fetched
    return folder.read(state)


def gather(folder: RunDir) -> None:
    """Have what a run's jobs left elsewhere fetched, before its record is read; not by a job itself.

    Raises:
        UserError: see `read`; or that is not possible.
    """
    jobs = [] if this_job(os.environ) else folder.jobs()
    if any(state.kind == "unknown" for state in (active(jobs) or {}).values()):
        remedy = "try again once its bucket can be read, or run its recipe anew"
        raise UserError(f"{folder.path}: a job of it has ended, and what it left cannot be fetched; {remedy}")


def job_state(folder: RunDir, step: str, words: Sequence[str] | None = None) -> JobState | None:
    """The state of the job that carries out a command of a run; None where there is none.

    Args:
        folder: the run.
        step: what the command does.
        words: its arguments, where only a job with these is meant.

    Raises:
        UserError: jobs.json is damaged, or names a place that is not there.
    """
    jobs = [job for job in folder.jobs() if job.step == step and words in (None, job.words)]
    if unknown := {job.place for job in jobs} - kinds().keys():
        raise UserError(f"{folder.path}: has a job at {', '.join(sorted(unknown))}, which is no place of this version")
    states = active(jobs)
    if states is None:
        return JobState("unknown")
    return next((states[job.id] for job in jobs if job.id in states), None)


def active(jobs: Sequence[Job]) -> dict[str, JobState] | None:
    """`Place.active` of jobs at any places; None where one place does not answer."""
    states: dict[str, JobState] = {}
    for place in {job.place for job in jobs} & kinds().keys():
        of_place = kinds()[place].active([job for job in jobs if job.place == place])
        if of_place is None:
            return None
        states |= of_place
    return states


def cancel(folder: RunDir, together: bool) -> list[str]:
    """Ask whatever is queued or running for a run to stop; a message for each.

    Args:
        folder: the run.
        together: whether all runs that were started with it are cancelled, so that there will be no results to show.
    """
    jobs = [job for job in folder.jobs() if together or job.step != "results"]
    return [message for kind in kinds().values() for message in kind.cancel(folder, jobs)]
