"""Tasks that complete runs, and the backends that carry them out: this machine, or SLURM's queue."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...base import hardware, processes
from ...base.errors import UserError
from ...base.files import opened
from ...base.processes import start_child, stop_requests
from ...base.terminal import PART, say
from ...config.finding import Finding
from ...config.gpus import Gpu, here
from ...training.run_record import JobState, Run
from ..rundir import RunDir

if TYPE_CHECKING:
    from .slurm import Slurm

type Backend = "Local | Slurm"

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
Step = Literal["prepare", "run", "evaluate"]
DOES = {"run": "the training", "evaluate": "the evaluation"}


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
        gpus: number of GPUs per node for training.
        nodes: number of nodes for training.
        steps: steps that the commands may carry out.
    """

    result: TaskResult
    claim: Callable[[], list[Command]]
    gpus: int
    nodes: int = 1
    steps: Sequence[Step] = ("prepare", "run")


_AGAIN = "run the same command again to continue"


def relevant(backend: Backend, findings: Iterable[Finding]) -> list[Finding]:
    """Findings that apply to a backend; only a local backend gets findings about this machine."""
    return [finding for finding in findings if backend.here or finding.scope != "machine"]


def read(run_dir: RunDir) -> Run:
    """Read a run's record, with its current state here and in SLURM's queue.

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
    from .slurm_cluster import active

    states = active([job for job in run_dir.jobs() if job.step == step and words in (None, job.words)])
    return JobState("unknown") if states is None else next(iter(states.values()), None)


class Local:
    """This machine.

    Args:
        rehearsal: whether the runs are rehearsals, which need no GPU.
        jobs: number of simultaneous tasks, one per GPU; None means one.

    Raises:
        UserError: this machine has fewer GPUs than jobs.
    """

    here: Literal[True] = True

    def __init__(self, rehearsal: bool, jobs: int | None = None):
        jobs = jobs or 1
        visible = [None] * jobs if jobs == 1 or rehearsal else [*hardware.visible_gpus()]
        if jobs > len(visible):
            raise UserError(f"--jobs {jobs}: each job needs its own GPU; {len(visible)} available on this machine")
        self.devices = visible[:jobs]  # the GPU of each job; None leaves the choice to the run

    def gpu(self) -> Gpu | None:
        """The first GPU of this machine."""
        return here()

    def check_size(self, gpus: int, nodes: int) -> None:
        """Refuse a run that needs more GPUs than this machine has.

        Raises:
            UserError: the run needs too many GPUs or nodes.
        """
        if nodes > 1:
            raise UserError(f"--nodes {nodes}: add --on slurm, which starts the run on each node")
        if gpus > max(available := len(hardware.visible_gpus()), 1):
            raise UserError(f"--gpus {gpus}: too many; {available} available on this machine")

    def submit(self, tasks: Sequence[Task], title: str) -> None:
        """Carry out tasks, one at a time on each device.

        After a request to stop, running commands stop at a checkpoint, and no further command starts.
        """
        waiting: deque[tuple[str, Task]] = deque()
        for number, task in enumerate(tasks, start=1):
            waiting.append((f"{number} of {len(tasks)}, {task.result.label}", task))
        with stop_requests() as stops:
            passed_on = 0
            workers = [self._worker(device, waiting, stops) for device in self.devices]
            while running := [process for worker in workers if (process := next(worker, None))]:
                for _ in stops[passed_on:]:
                    passed_on += 1
                    for process in running:
                        process.terminate()
                time.sleep(0.05)
        for _, task in waiting:
            task.result.errors = [f"interrupted before its start; {_AGAIN}"]

    def _worker(
        self, device: str | None, waiting: deque[tuple[str, Task]], stops: list[int]
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Carry out waiting tasks on a device, one by one; yield each process repeatedly until it ends."""
        while waiting and not stops:
            yield from self._commands(*waiting.popleft(), device, stops)

    def _commands(
        self, label: str, task: Task, device: str | None, stops: list[int]
    ) -> Iterator["subprocess.Popen[bytes]"]:
        try:
            commands = task.claim()
        except UserError as error:
            task.result.fail("run", str(error))
            return
        for command in commands:
            process = self._start(command, label, device)
            while process.poll() is None:
                yield process
            if not process.returncode:
                task.result.steps[command.step] = DONE
                task.result.run = command.folder.path
            elif not stops:
                log = self._log(command)
                task.result.fail(command.step, f"{DOES[command.step]} failed{f'; see {log}' if log else ''}")
                return
            if stops:
                task.result.errors = [f"interrupted; {_AGAIN}"]
                return

    def _start(self, command: Command, label: str, device: str | None) -> "subprocess.Popen[bytes]":
        log = self._log(command)
        say(f"{label}: {DOES[command.step]}{f'; log: {log}' if log else ''}")
        environment = os.environ | {PART: "1"}
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        recipe = str(Path(sys.executable).with_name("recipe"))
        with opened(log, "ab") if log else nullcontext() as stream:
            return start_child([recipe, *command.words], env=environment, stdout=subprocess.DEVNULL, stderr=stream)

    def _log(self, command: Command) -> Path | None:
        """Log file of a command; None if it writes to the terminal."""
        return command.folder.path / f"{command.step}.log" if len(self.devices) > 1 else None


def stop_holders(locks: Iterable[Path]) -> list[str]:
    """Ask the local processes that hold any of these locks to stop; return messages."""
    pids = {pid for lock in locks if (pid := processes.holder(lock))}
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    return [f"process {pid} is asked to stop" for pid in pids]


def cancel(folders: Iterable[RunDir], locks: Iterable[Path] = ()) -> list[str]:
    """Ask the commands that hold a lock to stop, or else the runs; return a message per process or job."""
    from . import slurm_cluster

    messages = stop_holders(locks)
    if messages:  # these commands stop their runs, and would otherwise start the next ones
        return messages
    for folder in folders:
        # ask each run only once: a second request would stop training without a checkpoint
        asked = slurm_cluster.cancel(folder.jobs()) or stop_holders(folder.path.rglob("*lock"))
        messages += [f"{folder.path}: {message}" for message in asked]
    return messages
