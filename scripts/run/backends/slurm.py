"""SLURM backend: `--on slurm`.

Job scripts are rendered from templates/slurm.sh.j2, stored with logs below runs/slurm/, and submitted with sbatch.
One job array prepares rows, one trains, and one evaluates. Each evaluation task waits for its training task. A job
near its time limit stops at a checkpoint and is requeued. Requeued and preempted jobs resume from the last valid
checkpoint.
"""

import os
import re
import shlex
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex

from ...base import paths
from ...base.errors import UserError, WorkFailed, require_plain
from ...base.files import write_atomically
from ...base.paths import template_environment
from ...base.run_files import RunFile
from ...base.terminal import PART, say
from ...config.gpus import Gpu, find_gpu
from ...training.run_record import Job, JobState
from ..rundir import JOB, Node, RunDir, stamped
from . import BACKENDS, Backend, Command, Step, Task, claimed, job_state
from .slurm_cluster import (
    NAME,
    STEPS,
    Cluster,
    ask,
    cluster_settings,
    forget_queue,
    require_answer,
    sbatch,
    settings_file,
    state_of,
)

GRACE = 300  # training stops at a checkpoint this many seconds before the limit; --on slurm,signal=… changes it


@BACKENDS.register(NAME)
class Slurm(Backend):
    """The queue of a SLURM cluster.

    Args:
        rehearsal: whether the runs are rehearsals, which need no GPU.
        jobs: maximum number of simultaneous tasks of an array; None sets no limit.
        options: sbatch options, as KEY=VALUE.
        submits: whether jobs are about to be submitted.

    Raises:
        UserError: a setting is invalid, or jobs are to be submitted and SLURM does not answer.
    """

    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str], submits: bool):
        require_plain(Path.cwd(), paths.runs(), sys.executable)
        self.cluster = cluster_settings(options)
        self.jobs = jobs
        self._gpu = find_gpu(self.cluster.gpu, "gpu") if self.cluster.gpu and not rehearsal else None
        if submits:
            require_answer()

    @property
    def gpu(self) -> Gpu | None:
        """GPU in the cluster's settings, or None."""
        return self._gpu

    def check_size(self, gpus: int, nodes: int) -> None:
        """Accept any size; sbatch tests it in `Batch.check`."""

    def preview(self, task: Task) -> str:
        """Scripts of the jobs that would prepare and train a run."""
        (training,) = task.claim()
        batch = Batch(self.cluster, self.jobs, _file_name(task.result.recipe), task.gpus, task.nodes)
        return batch.script("prepare", [_preparing(training)], 1) + batch.script("run", [training], 1)

    def submit(self, tasks: Sequence[Task], title: str) -> list[RunDir]:
        """Submit tasks as one job array per step; record each job in its task's `result`.

        Evaluations whose training is not among the tasks get arrays of their own.

        Args:
            tasks: tasks that do not depend on each other.
            title: name of this submission.

        Returns:
            Folders of the queued runs.

        Raises:
            UserError: SLURM refuses the jobs; nothing was submitted.
            WorkFailed: SLURM accepted only some jobs; these are queued.
        """
        if not tasks:
            return []
        forget_queue()  # the cached job states may be outdated after checks and plans
        require_answer()
        batch = Batch(self.cluster, self.jobs, _file_name(title), tasks[0].gpus, tasks[0].nodes)
        batch.check({step for task in tasks for step in task.steps}, len(tasks))
        claims = claimed(tasks)
        self._queue(batch, claims)
        return [commands[0].folder for commands in claims]

    def _queue(self, batch: "Batch", claims: Sequence[list[Command]]) -> None:
        """Submit the commands of each task: a training, an evaluation, or both in this order."""
        trainings = []
        evaluations = []  # each waits for the training with the same index
        scoring_only = []  # evaluations whose training is not among these tasks
        for commands in claims:
            for command in commands:
                if command.step == "run":
                    trainings.append(command)
                elif len(commands) > 1:
                    evaluations.append(command)
                else:
                    scoring_only.append(command)
        preparing = {}  # by folder of the prepared rows
        for training in trainings:
            preparing[training.folder.prepared] = _preparing(training)
        prepared = batch.submit("prepare", list(preparing.values()))
        trained = batch.submit("run", trainings, f"afterany:{prepared}")  # training prepares missing rows itself
        batch.submit("evaluate", evaluations, f"aftercorr:{trained}")
        for job, commands in _by_training_job(scoring_only).items():
            batch.submit("evaluate", commands, f"afterok:{job}" if job else None)

    @classmethod
    def state(cls, job: Job) -> JobState | None:
        """State of a job; unknown if SLURM does not answer."""
        return state_of(job)

    @classmethod
    def cancel(cls, job: Job) -> list[str]:
        """Cancel a job; training reaches a checkpoint if SLURM's setting KillWait gives it enough time."""
        state = state_of(job)
        if state is None or not state.job:
            return []
        ask("scancel", state.job)
        forget_queue()
        return [f"job {state.job} is cancelled"]

    @classmethod
    def node(cls) -> Node | None:
        """This process's node, from srun's variables."""
        if os.environ.get("SLURM_NNODES") == "1":
            return None
        rank, head, job = (os.environ[f"SLURM_{name}"] for name in ("NODEID", "LAUNCH_NODE_IPADDR", "JOB_ID"))
        return Node(int(rank), head, port=20000 + int(job) % 10000)  # different for jobs on the same node


def _file_name(title: str) -> str:
    """Title of a submission, with characters that suit file names."""
    return re.sub(r"[^\w.,=+-]+", "-", title)


def _preparing(training: Command) -> Command:
    """Command that tokenizes the rows of a training, and fetches its base model."""
    return replace(training, words=[*training.words, "--prepare"])


def _by_training_job(evaluations: Sequence[Command]) -> dict[str | None, list[Command]]:
    """Evaluations by id of the queued training job that they have to wait for; None if their training has ended."""
    by_job: dict[str | None, list[Command]] = {}
    for evaluation in evaluations:
        training = job_state(evaluation.folder, "run")
        queued = training.job if training and training.backend == NAME else None
        by_job.setdefault(queued, []).append(evaluation)
    return by_job


@dataclass
class Batch:
    """Scripts and jobs of one submission.

    Attributes:
        cluster: settings of the cluster.
        jobs: maximum number of simultaneous tasks of an array; None sets no limit.
        title: name of the submission, usable in file names.
        gpus: number of GPUs per node for each training.
        nodes: number of nodes for each training.
        folder: folder of the scripts and logs, created with the first script.
        submitted: ids of the submitted jobs.
    """

    cluster: Cluster
    jobs: int | None
    title: str
    gpus: int
    nodes: int
    submitted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # two submissions in one second must not replace each other's scripts before sbatch reads them
        self.folder = paths.runs().absolute() / "slurm" / f"{stamped(self.title)}-{token_hex(2)}"

    def check(self, steps: Container[Step], tasks: int) -> None:
        """Test with sbatch whether SLURM would accept the jobs.

        Args:
            steps: steps that get jobs.
            tasks: maximum number of tasks per job array.

        Raises:
            UserError: SLURM would refuse a job.
        """
        for step in filter(steps.__contains__, STEPS):
            options = self._options(step, tasks)
            try:
                ask("sbatch", "--test-only", *options, script=self.script(step, [], tasks))
            except UserError as error:
                where = f"--on slurm,KEY=VALUE or {settings_file()}"
                raise UserError(f"{error}; use {where} to change the options of {step}: {' '.join(options)}") from None

    def submit(self, step: Step, tasks: Sequence[Command], after: str | None = None) -> str | None:
        """Submit an array and return its id, or None without tasks.

        Args:
            after: dependency on earlier jobs, as sbatch writes it.

        Raises:
            WorkFailed: sbatch refuses the array although the check succeeded.
        """
        if not tasks:
            return None
        file = (self.folder / f"{len(self.submitted) + 1}-{step}.sh").resolve()
        write_atomically(file, self.script(step, tasks, len(tasks)))
        waits = [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
        options = self._options(step, len(tasks))  # SBATCH_ variables override options in a script
        try:
            job = sbatch(*options, *waits, str(file))
        except UserError as error:
            queued = f"; already queued: job {', '.join(self.submitted)}" if self.submitted else ""
            raise WorkFailed(f"{error}{queued}; run the same command again to continue") from None
        self.submitted.append(job)
        say(f"job {job}: {step}, {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}; {file}")
        for i, task in enumerate(tasks):
            id_ = f"{job}_{i}"
            job_of_task = Job(backend=NAME, id=id_, step=step, script=str(file), words=task.words)
            task.folder.add_job(job_of_task)
            task.result.steps[step] = f"queued (job {id_})"
        forget_queue()
        return job

    def script(self, step: Step, tasks: Sequence[Command], count: int) -> str:
        """Script of a job array.

        Args:
            step: the step of all tasks.
            tasks: commands of the tasks; empty if only the options are tested.
            count: number of tasks in the array.
        """
        jinja = template_environment(paths.TEMPLATES)
        jinja.filters["quote"] = lambda value: shlex.quote(str(value))
        return jinja.get_template("slurm.sh.j2").render(
            title=self.title,
            step=step,
            log=RunFile.JOB_LOG.format(step),
            options=self._options(step, count),
            setup=self.cluster.setup,
            cwd=Path.cwd(),
            part=PART,
            job=f"{JOB}={NAME}:",
            tasks=tasks,
            nodes=self._nodes(step),
            launcher=self._launcher(step),
        )

    def _launcher(self, step: Step) -> str:
        """Shell command that starts `recipe` on each node of a step."""
        if self.cluster.prefix:
            recipe = f"{self.cluster.prefix} recipe"
        else:
            recipe = shlex.quote(str(Path(sys.executable).with_name("recipe")))
        nodes = self._nodes(step)
        if nodes == 1:
            return recipe
        cores = "${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"  # srun does not inherit this option
        return f"srun --nodes={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 {cores} {recipe}"

    def _nodes(self, step: Step) -> int:
        return self.nodes if step == "run" else 1

    def _gpus(self, step: Step) -> int:
        """GPUs per node: an evaluation uses one, and preparing rows none."""
        if step == "run":
            return self.gpus
        return min(self.gpus, 1) if step == "evaluate" else 0

    def _options(self, step: Step, count: int) -> list[str]:
        """sbatch options for a step's array."""
        array = f"0-{count - 1}"
        if self.jobs and step != "prepare":
            array += f"%{self.jobs}"
        options = {
            "job-name": f"{self.title}-{step}",
            "output": str(self.folder / "%x-%A_%a.log"),
            "open-mode": "append",
            "array": array,
            "nodes": str(self._nodes(step)),
            "ntasks-per-node": "1",
            "requeue": "",
            "signal": f"B:USR1@{GRACE}",
        }
        options |= _cluster_options(self.cluster.options | self.cluster.of_step.get(step, {}), self._gpus(step))
        return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]


def _cluster_options(options: dict[str, str], gpus: int) -> dict[str, str]:
    """Options of a cluster for jobs with a number of GPUs per node, with {gpus} replaced by this number."""
    if gpus:
        return {key: value.replace("{gpus}", str(gpus)) for key, value in _with_gpus(options, gpus).items()}
    options = {key: value for key, value in options.items() if "{gpus}" not in value}
    if _request_gpus(options):
        return options
    # sbatch refuses these options without a GPU
    return {key: value for key, value in options.items() if not key.endswith("-per-gpu")}


def _with_gpus(options: dict[str, str], gpus: int) -> dict[str, str]:
    """Options that request GPUs; those of the cluster may do so already."""
    if _request_gpus(options):
        return options
    gres = f"{options['gres']}," if options.get("gres") else ""
    return options | {"gres": f"{gres}gpu:{gpus}"}


def _request_gpus(options: dict[str, str]) -> bool:
    return not options.keys().isdisjoint(("gpus", "gpus-per-node", "gpus-per-task")) or "gpu" in options.get("gres", "")
