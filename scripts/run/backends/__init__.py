"""Tasks that complete runs, and the backends that carry them out: this machine, and queues of jobs."""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...base import processes
from ...base.errors import UserError
from ...base.registry import Registry
from ...base.yamlfiles import Config
from ...config.finding import Finding
from ...config.gpus import Gpu
from ...training.run_record import Job, JobState, Run
from ..rundir import Node, RunDir, this_job

BACKENDS: "Registry[type[Backend]]" = Registry("backend", f"{__name__}.local", f"{__name__}.slurm")
"""Backends by the name that --on gives them."""

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
Step = Literal["prepare", "run", "merge", "evaluate"]
NOT_ASKED = "state not asked: the job is not yours"
DOES = {"run": "the training", "merge": "the merge", "evaluate": "the evaluation"}


@dataclass
class TaskResult:
    """Result of a recipe: the state of each step, and the errors of a failed one.

    Attributes:
        trial: name of the sweep trial, or None.
        steps: for each step: done, skipped (its inputs are unchanged), queued, or failed.
        run: folder of the finished run.
        seed: seed, if the recipe runs with several seeds.
    """

    recipe: str
    trial: str | None = None
    steps: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    run: Path | None = None
    seed: int | None = None

    def fail(self, step: str, *errors: str) -> None:
        """Record that a step failed, with its errors."""
        self.steps[step], self.errors = FAILED, list(errors)

    @property
    def problem(self) -> str | None:
        """Errors in words; None if no step failed or was interrupted."""
        return "\n".join(self.errors) or None

    @property
    def label(self) -> str:
        """Name in messages."""
        return self.trial or self.recipe + ("" if self.seed is None else f", seed {self.seed}")

    def as_row(self) -> dict[str, Any]:
        """Row for a summary table."""
        name = {"trial" if self.trial else "recipe": self.label}
        return name | {step: self.steps.get(step) for step in ("check", "plan", "run", "evaluate")}


@dataclass
class Command:
    """A `recipe` command that carries out one step of a run.

    Attributes:
        step: the step.
        folder: the run folder.
        words: arguments of `recipe`.
        result: result in which the step is recorded.
    """

    step: Step
    folder: RunDir
    words: list[str]
    result: TaskResult


@dataclass
class Task:
    """Commands that complete a run, carried out one after another.

    Attributes:
        claim: function that finds or creates the run folder and returns the commands; called once, just before the task
            starts.
        config: config of the run; of a new one, without the keys that its folder determines.
        gpus: number of GPUs per node for training.
        nodes: number of nodes for training.
        steps: steps that the commands may carry out.
    """

    result: TaskResult
    claim: Callable[[], list[Command]]
    config: Config
    gpus: int
    nodes: int = 1
    steps: Sequence[Step] = ("prepare", "run")


class Backend(ABC):
    """A place that carries out tasks; what is not abstract suits a queue of jobs on other machines.

    Args:
        rehearsal: whether the runs are rehearsals, which need no GPU.
        jobs: maximum number of simultaneous tasks; None leaves it to the backend.
        options: options after the name in --on, as KEY=VALUE.
        submits: whether jobs are about to be submitted.

    Raises:
        UserError: an option is wrong, or the backend cannot be used.
    """

    @abstractmethod
    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str], submits: bool): ...

    @property
    @abstractmethod
    def gpu(self) -> Gpu | None:
        """GPU for which runs are composed, checked and planned, or None."""

    @abstractmethod
    def check_size(self, gpus: int, nodes: int) -> None:
        """Refuse a run that needs too many GPUs or nodes, unless `submit` does.

        Raises:
            UserError: the run needs too many.
        """

    def relevant(self, findings: Iterable[Finding]) -> list[Finding]:
        """Findings that apply to the backend: by default, not those about this machine."""
        return [finding for finding in findings if finding.scope != "machine"]

    @abstractmethod
    def preview(self, task: Task) -> str:
        """Config or scripts with which `carry_out` would start a training; nothing is written."""

    @abstractmethod
    def submit(self, tasks: Sequence[Task], title: str) -> list[RunDir]:
        """Carry out tasks, or submit them as jobs; record steps and errors in their `result`.

        Args:
            tasks: tasks that do not depend on each other.
            title: name of this submission.

        Returns:
            Folders of the queued runs.

        Raises:
            UserError: the backend refuses the tasks; nothing was started.
            WorkFailed: only some jobs were submitted.
        """

    def carry_out[T](self, task: Task, work: Callable[[], T]) -> T | RunDir:
        """Carry out one task: by default as a job.

        Args:
            task: the task.
            work: function that does the work of the task in this process.

        Returns:
            The folder of the queued run, or what `work` returns.

        Raises:
            UserError: the backend refuses the task; nothing was started.
        """
        folders = self.submit([task], task.result.recipe)
        if not folders:
            raise UserError(str(task.result.problem))
        return folders[0]

    def can_wait_for(self, job: JobState | None) -> bool:
        """True if a task can wait for a job: one of the same backend, whose state is known."""
        return job is not None and type(self) is BACKENDS.get(job.backend)

    @classmethod
    @abstractmethod
    def state(cls, job: Job) -> JobState | None:
        """State of a job that this user has submitted; None if it has ended."""

    @classmethod
    @abstractmethod
    def cancel(cls, job: Job) -> list[str]:
        """Ask a job that this user has submitted to stop, unless it has ended; return messages."""

    @classmethod
    def node(cls) -> Node | None:
        """This process's node in a job with several nodes; None for backends without such jobs."""
        return None


def claimed(tasks: Iterable[Task]) -> list[list[Command]]:
    """Commands of each task that has any, to be submitted; a task's `result` records its error."""
    claims = []
    for task in tasks:
        try:
            if commands := task.claim():
                commands[0].folder.refuse_links()
                claims.append(commands)
        except UserError as error:
            task.result.fail("run", str(error))
    return claims


def this_node() -> Node | None:
    """This process's node in a job with several nodes, or None."""
    job = this_job()
    return BACKENDS[job.backend].node() if job else None


def read(run_dir: RunDir) -> Run:
    """Read a run's record, with its current state here and in the queue of its jobs.

    Raises:
        UserError: run.json is missing or damaged, or jobs.json is damaged.
    """
    return run_dir.read(job_state(run_dir, "run"))


def job_state(run_dir: RunDir, step: str, words: Sequence[str] | None = None) -> JobState | None:
    """State of the job for one step of a run; None without a job.

    Args:
        run_dir: the run folder.
        step: the step.
        words: arguments of `recipe` in the job's command; None accepts any job of the step.

    Raises:
        UserError: jobs.json is damaged.
    """
    for job in run_dir.jobs():
        if job.step == step and words in (None, job.words):
            backend = _own_backend(run_dir, job)
            state = backend.state(job) if backend else JobState("unknown", NOT_ASKED)
            if state:
                return state
    return None


def unfinished_job(run_dir: RunDir, step: str, words: Sequence[str] | None = None) -> JobState | None:
    """State of the job for one step of a run if its queue has the job; see `job_state`."""
    state = job_state(run_dir, step, words)
    return None if state is None or state.kind == "unknown" else state


def _own_backend(run_dir: RunDir, job: Job) -> "type[Backend] | None":
    """Backend to which this user has submitted a job; None for others' jobs, of which nothing is asked."""
    return BACKENDS.get(job.backend) if run_dir.submitted(job) else None


def stop_holders(locks: Iterable[Path]) -> list[str]:
    """Ask the local processes that hold any of these locks to stop; return messages."""
    pids = {pid for lock in locks if (pid := processes.holder(lock))}
    for pid in pids:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGTERM)
    return [f"process {pid} is asked to stop" for pid in pids]


def cancel(folders: Iterable[RunDir], locks: Iterable[Path] = ()) -> list[str]:
    """Ask the commands that hold a lock to stop, or else the runs; return a message per process or job."""
    messages = stop_holders(locks)
    if messages:  # these commands stop their runs, and would otherwise start the next ones
        return messages
    for folder in folders:
        asked = []
        for job in reversed(folder.jobs()):  # first those that wait for others, and would then start
            if backend := _own_backend(folder, job):
                asked += backend.cancel(job)
        # ask each run only once: a second request would stop training without a checkpoint
        asked = asked or stop_holders(folder.path.rglob("*lock"))
        messages += [f"{folder.path}: {message}" for message in asked]
    return messages
