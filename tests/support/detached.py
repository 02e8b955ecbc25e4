"""A third backend, `--on detached,python=FILE`: each task is a job in a session of its own, which outlives `recipe`.

A job runs the commands of its task one after the other. The files of a job are in a folder below runs/detached: its
script, and the id of its process.
"""

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import psutil

from qlora_recipes.base import paths
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_atomically
from qlora_recipes.config.gpus import Gpu
from qlora_recipes.run.backends import BACKENDS, Backend, Command, Task, claimed
from qlora_recipes.run.rundir import JOB, RunDir
from qlora_recipes.training.run_record import Job, JobState

NAME = "detached"
RECIPE = "import sys; import detached; from qlora_recipes.cli import main; sys.exit(main())"


@BACKENDS.register(NAME)
class Detached(Backend):
    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str], submits: bool):
        self.python = dict(option.split("=", 1) for option in options).get("python")
        if self.python is None:
            raise UserError("add ,python=FILE, the Python that has the package", key=f"--on {NAME}")

    gpu: Gpu | None = None

    def check_size(self, gpus: int, nodes: int) -> None:
        if nodes > 1:
            raise UserError("one node only", key=f"--nodes {nodes}")

    def preview(self, task: Task) -> str:
        return self._script(task.claim()) + f"# trains {task.config['base_model']} on {task.gpus} GPUs\n"

    def submit(self, tasks: Sequence[Task], title: str) -> list[RunDir]:
        claims = claimed(tasks)
        for commands in claims:
            self._start(commands)
        return [commands[0].folder for commands in claims]

    def _script(self, commands: Sequence[Command]) -> str:
        lines = [f"{shlex.join([str(self.python), '-c', RECIPE, *command.words])} || exit\n" for command in commands]
        return "#!/bin/sh\n" + "".join(lines)

    def _start(self, commands: Sequence[Command]) -> None:
        number = token_hex(4)
        script = paths.runs().absolute() / NAME / number / "job.sh"
        write_atomically(script, self._script(commands))
        for command in commands:
            job = Job(backend=NAME, id=number, step=command.step, script=str(script), words=command.words)
            command.folder.add_job(job)
            command.result.steps[command.step] = f"queued (job {number})"
        with script.with_name("log").open("wb") as log:
            process = subprocess.Popen(
                ["sh", str(script)],
                env=os.environ | {JOB: f"{NAME}:{number}", "PYTHONPATH": str(Path(__file__).parent)},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        script.with_name("pid").write_text(str(process.pid))

    @classmethod
    def state(cls, job: Job) -> JobState | None:
        pid = _process_of(job)
        return JobState("running", job=job.id, backend=NAME) if pid else None

    @classmethod
    def cancel(cls, job: Job) -> list[str]:
        pid = _process_of(job)
        if pid is None:
            return []
        for child in psutil.Process(pid).children():
            child.send_signal(signal.SIGTERM)  # to `recipe`, which stops at a checkpoint
        return [f"job {job.id} is asked to stop"]


def _process_of(job: Job) -> int | None:
    """Process of a job that has not ended."""
    file = Path(job.script).with_name("pid")
    with suppress(OSError, psutil.NoSuchProcess):
        process = psutil.Process(int(file.read_text()))
        if process.status() != psutil.STATUS_ZOMBIE and job.script in process.cmdline():
            return process.pid
    return None
