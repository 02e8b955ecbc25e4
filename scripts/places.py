"""Where the commands of runs are carried out: this machine, or a cluster's queue.

A further place is one more module with a class that does what `Place` says, and a name for it in `kinds`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

from .finding import Finding
from .gpus import Gpu
from .rundir import Job, RunDir

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
Step = Literal["prepare", "run", "evaluate"]
DOES = {"run": "the training", "evaluate": "the evaluation"}


@dataclass
class Outcome:
    """What became of a recipe: each step done, skipped because its inputs are as they were, or failed, and why.

    Attributes:
        member: which of a sweep over the recipe it is.
        run: its finished run.
    """

    recipe: str
    member: str | None = None
    steps: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    run: Path | None = None

    def fail(self, step: str, problem: str) -> None:
        """Note that a step failed, which is the last then."""
        self.steps[step], self.problem = FAILED, problem

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.member or self.recipe

    def as_row(self) -> dict[str, Any]:
        """The row of a summary."""
        name = {"member" if self.member else "recipe": self.label}
        return name | {step: self.steps.get(step) for step in ("check", "plan", "run", "evaluate")}


@dataclass
class Command:
    """One command of a run.

    Attributes:
        step: what it does for the run.
        folder: the run's.
        words: the command line behind `recipe`.
        rows: what commands that prepare the same rows for training have in common.
    """

    step: Step
    folder: RunDir
    words: list[str]
    rows: str = ""


@dataclass
class Work:
    """The commands that bring a run to its end, in their order; each is worth carrying out once the one before is done.

    Attributes:
        commands: asked for one at a time, since the first claims the run's folder.
        gpus: how many its training needs on each node.
        nodes: how many of those.
        steps: what may be among the commands, and a place has to be able to do.
    """

    outcome: Outcome
    commands: Iterator[Command]
    gpus: int
    nodes: int = 1
    steps: Sequence[Step] = ("prepare", "run")


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
    def active(cls, jobs: Sequence[Job]) -> dict[str, str] | None:
        """The jobs that are there, those given if they are, as "queued: Priority" or "running" by their ids; None where
        that is not known."""

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
    return [finding for finding in found if place.here or finding.rule != "no-gpu"]


def active(jobs: Iterable[Job]) -> dict[str, str] | None:
    """Those of some jobs that are not at their end, as `Place.active` has them; None where that is not known."""
    found: dict[str, str] = {}
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
