"""This machine, which carries out the commands of runs while one waits."""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Container, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from ..base import machine
from ..base.errors import UserError
from ..base.processes import end_with_parent, stop_requests
from ..base.progress import say
from ..configs import gpus
from ..configs.gpus import Gpu
from ..runs.rundir import Job, JobState, RunDir, this_job
from ..runs.tasks import DOES, DONE, Command, Work


class Local:
    """A `places.Place`.

    Args:
        rehearsal: whether what runs here is one, which needs no GPU.
        jobs: how many works to carry out at a time, each on a GPU of its own; None for one.
        options: there are none.

    Raises:
        UserError: there are fewer GPUs than jobs.
    """

    here = True

    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str]):
        if options:
            raise UserError(f"--slurm {options[0]}: goes with --on slurm")
        self.devices = devices_for(jobs or 1, rehearsal)

    def gpu(self) -> Gpu | None:
        """This machine's first."""
        return gpus.here()

    def submit(self, works: Sequence[Work], title: str, runs: Path, results: list[str]) -> None:
        """Carry works out, as many at a time as there are devices.

        A request to stop is passed on to what is running, which ends in order, and nothing more is begun.
        """
        waiting, free, running = deque(works), list(self.devices), list[_Child]()
        with stop_requests() as stops:
            passed_on = 0
            while running or (waiting and not stops):
                while waiting and free and not stops:
                    running.append(_Child(waiting.popleft(), free.pop(0), with_log=len(self.devices) > 1))
                for child in list(running):
                    if not child.goes_on(may_begin=not stops):
                        running.remove(child)
                        free.append(child.device)
                for _ in stops[passed_on:]:
                    passed_on += 1
                    for child in running:
                        child.terminate()
                time.sleep(0.05)
        for work in waiting:
            work.outcome.problem = "interrupted before it was begun; the same command goes on"

    @classmethod
    def active(cls, jobs: Sequence[Job]) -> dict[str, JobState]:
        """Nothing is queued here."""
        return {}

    @classmethod
    def log(cls, folder: RunDir, step: str) -> Path:
        """Where several commands go on at a time; that of one goes to the terminal."""
        return folder.path / f"{step}.log"

    @classmethod
    def cancel(cls, folder: RunDir, jobs: Sequence[Job]) -> list[str]:
        """Ask the process that holds one of the run's locks; one of a job is asked by `slurm` already."""
        return stop_holders(folder.path.rglob("*lock"), {job.id for job in jobs})


def stop_holders(locks: Iterable[Path], jobs: Container[str] = ()) -> list[str]:
    """Ask the processes on this machine that hold some locks to stop, their children only through them.

    Args:
        locks: the locks' files.
        jobs: whose processes are not meant.

    Returns:
        What was asked, in words.
    """
    files = {str(lock.resolve()) for lock in locks}
    holding = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or gone
            if files.intersection(file.path for file in process.open_files()):
                holding[process.pid] = process
    asked = []
    for process in holding.values():
        with suppress(psutil.Error):
            if process.ppid() not in holding and this_job(process.environ()) not in jobs:
                process.terminate()
                asked.append(f"process {process.pid} is asked to stop")
    return asked


def devices_for(jobs: int, rehearsal: bool) -> list[str | None]:
    """For each job the GPU that it sees; None leaves it to the run.

    Raises:
        UserError: there are fewer GPUs than jobs.
    """
    if jobs == 1 or rehearsal:
        return [None] * jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = named.split(",") if named else [str(i) for i in range(len(machine.gpus()))]
    if jobs > len(seen):
        raise UserError(f"--jobs {jobs}: one GPU a job, and this machine has {len(seen)}")
    return [*seen[:jobs]]


class _Child:
    """The commands of one work, of which one is running at a time.

    Args:
        work: the work.
        device: the GPU that they see; None leaves it to them.
        with_log: whether what they say goes to files in the run's folder, instead of this process's own stderr.
    """

    def __init__(self, work: Work, device: str | None, with_log: bool):
        self.device, self._outcome, self._commands = device, work.outcome, work.commands
        self._with_log = with_log
        self._command: Command | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def goes_on(self, may_begin: bool) -> bool:
        """Begin the next command once the one before has ended; False where there is none, or may be none, any more."""
        if self._process and self._command:
            if (code := self._process.poll()) is None:
                return True
            if code and may_begin:
                self._fail(self._command, code)
                return False
            if not code:
                self._outcome.steps[self._command.step] = DONE
                if self._command.step == "run":
                    self._outcome.run = self._command.folder.path
        if not may_begin:
            self._outcome.problem = "interrupted; the same command goes on"
            return False
        try:
            self._command = next(self._commands, None)
        except UserError as error:
            self._outcome.fail("run", str(error))
            return False
        if self._command is None:
            return False
        self._start(self._command)
        return True

    def _fail(self, command: Command, code: int) -> None:
        problem = f"{DOES[command.step]} {'was refused' if code == 2 else 'failed'}"
        said = f"; {Local.log(command.folder, command.step)} has what was said" if self._with_log else ""
        self._outcome.fail(command.step, problem + said)

    def _start(self, command: Command) -> None:
        say(f"{self._outcome.label}: recipe {shlex.join(command.words)}")
        with ExitStack() as stack:
            log = None
            if self._with_log:
                log = stack.enter_context(Local.log(command.folder, command.step).open("ab"))
            self._process = subprocess.Popen(
                [str(Path(sys.executable).with_name("recipe")), *command.words],
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": self.device} if self.device else {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
                preexec_fn=end_with_parent,
            )

    def terminate(self) -> None:
        """Pass a request to stop on."""
        if self._process:
            self._process.terminate()
