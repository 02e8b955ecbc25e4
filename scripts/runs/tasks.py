"""Commands that complete a run, and their results."""

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
    """Result of a recipe: the state of each step, and the problem if one failed.

    Attributes:
        member: name of the sweep member, or None.
        steps: for each step: done, skipped (its inputs are unchanged), queued, or failed.
        run: folder of the finished run.
        seed: seed, if the recipe runs with several seeds.
    """

    recipe: str
    member: str | None = None
    steps: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    run: Path | None = None
    seed: int | None = None

    def fail(self, step: str, problem: str) -> None:
        """Record that a step failed, with the problem."""
        self.steps[step], self.problem = FAILED, problem

    @property
    def label(self) -> str:
        """Name in messages."""
        return self.member or self.recipe + ("" if self.seed is None else f", seed {self.seed}")

    def as_row(self) -> dict[str, Any]:
        """Row for a summary table."""
        name = {"member" if self.member else "recipe": self.label}
        return name | {step: self.steps.get(step) for step in ("check", "plan", "run", "evaluate")}


@dataclass
class Command:
    """A `recipe` command that carries out one step of a run.

    Attributes:
        step: the step.
        folder: the run folder.
        words: arguments of `recipe`.
        result: result in which the command's job is recorded.
    """

    step: Step
    folder: RunDir
    words: list[str]
    result: TaskResult | None = None


@dataclass
class Task:
    """Commands that complete a run, carried out one after another.

    Attributes:
        claim: function that finds or creates the run folder and returns the commands; called once, just before the task
            starts.
        gpus: number of GPUs per node for training.
        nodes: number of nodes for training.
        steps: steps that the commands may carry out.
    """

    result: TaskResult
    claim: Callable[[], list[Command]]
    gpus: int
    nodes: int = 1
    steps: Sequence[Step] = ("prepare", "run")
