"""This machine: commands as child processes, or the work of one task in this process."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from ...base import hardware, yamlfiles
from ...base.errors import UserError
from ...base.files import opened
from ...base.processes import start_child, stop_requests
from ...base.run_files import RunFile
from ...base.secrets import without_secrets
from ...base.terminal import PART, say
from ...config.finding import Finding
from ...config.gpus import Gpu, here
from ...training.run_record import Job, JobState
from ..rundir import RunDir
from . import BACKENDS, DOES, DONE, Backend, Command, Task

_AGAIN = "run the same command again to continue"


@BACKENDS.register("local")
class Local(Backend):
    """This machine.

    Args:
        rehearsal: whether the runs are rehearsals, which need no GPU.
        jobs: number of simultaneous tasks, one per GPU; None means one.
        options: none.
        submits: without effect.

    Raises:
        UserError: this machine has fewer GPUs than jobs, or there are options.
    """

    def __init__(
        self, rehearsal: bool = False, jobs: int | None = None, options: Sequence[str] = (), submits: bool = True
    ):
        if options:
            raise UserError("this machine has no options", key=f"--on local,{','.join(options)}")
        jobs = jobs or 1
        visible = [None] * jobs if jobs == 1 or rehearsal else [*hardware.visible_gpus()]
        if jobs > len(visible):
            raise UserError(f"--jobs {jobs}: each job needs its own GPU; {len(visible)} available on this machine")
        self.devices = visible[:jobs]  # the GPU of each job; None leaves the choice to the run

    @property
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

    def relevant(self, findings: Iterable[Finding]) -> list[Finding]:
        """All findings."""
        return list(findings)

    def preview(self, task: Task) -> str:
        """The config, without secrets."""
        return yamlfiles.write_yaml(without_secrets(task.config))

    def carry_out[T](self, task: Task, work: Callable[[], T]) -> T:
        """Do the work of a task in this process."""
        return work()

    def submit(self, tasks: Sequence[Task], title: str) -> list[RunDir]:
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
        return []

    @classmethod
    def state(cls, job: Job) -> JobState | None:
        """None: a run on this machine has a lock instead of a job."""
        return None

    @classmethod
    def cancel(cls, job: Job) -> list[str]:
        """Nothing: see `state`."""
        return []

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
        return command.folder.path / RunFile.COMMAND_LOG.format(command.step) if len(self.devices) > 1 else None
