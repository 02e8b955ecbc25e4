"""The commands that complete a run, and their results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .rundir import RunDir

DONE, SKIPPED, FAILED = "done", "skipped", "failed"


Step = Literal["prepare", "run", "evaluate"]
DOES = {"run": "the training", "evaluate": "the evaluation"}


@dataclass
class TaskResult:
    """Result of a recipe: each step done, skipped for unchanged inputs, or failed, and the reason.

    Attributes:
        member: which of a sweep over the recipe it is.
        seed: which of several seeds of the recipe it is of.
        run: its finished run.
    """

    recipe: str
    member: str | None = None
    steps: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    run: Path | None = None
    seed: int | None = None

    def fail(self, step: str, problem: str) -> None:
        """Note that a step failed, which is the last then."""
        self.steps[step], self.problem = FAILED, problem

    @property
    def label(self) -> str:
        """Its name in messages."""
        return self.member or self.recipe + ("" if self.seed is None else f", seed {self.seed}")

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
        words: the arguments of `recipe`.
        rows: what commands that prepare the same rows for training have in common.
        result: where its job is noted.
    """

    step: Step
    folder: RunDir
    words: list[str]
    rows: str = ""
    result: TaskResult | None = None


@dataclass
class Task:
    """The commands that complete a run, in order, each after the one before.

    Attributes:
        claim: takes the run's folder, a new one if need be, and returns the commands; called once, when the task is
            about to start.
        gpus: how many its training needs on each node.
        nodes: how many of those.
        steps: those that may be among the commands.
    """

    result: TaskResult
    claim: Callable[[], list[Command]]
    gpus: int
    nodes: int = 1
    steps: Sequence[Step] = ("prepare", "run")
