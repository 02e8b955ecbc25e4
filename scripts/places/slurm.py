"""A cluster's queue, SLURM: `--on slurm`.

Jobs are scripts rendered from templates/slurm.sh.j2, kept with their logs below runs/slurm/, and given to sbatch: an
array each for preparing the rows, for training, and for evaluating, every task of which waits for its own training; at
last a job that shows the results. A job that nears its time limit, is preempted or requeued goes on from the last
whole checkpoint.
"""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from getpass import getuser
from itertools import chain
from pathlib import Path

from ..base import paths
from ..base.errors import UserError, WorkFailed
from ..base.files import write_atomically
from ..base.progress import say
from ..base.templating import environment
from ..configs import gpus
from ..configs.gpus import Gpu
from ..runs.rundir import Job, JobState, RunDir, new_folder
from ..runs.tasks import Command, Outcome, Work
from .slurm_settings import STEPS, Settings, settings, settings_file

GRACE = 300  # seconds before a time limit in which a training can end at a checkpoint; --slurm signal=... sets others


def queue(users: Iterable[str]) -> dict[tuple[str, str], JobState] | UserError:
    """The states of the jobs of users that are not at their end, by id and script; an error where SLURM does not
    answer. It is asked once a minute, since it can take its time."""
    return _queue(frozenset(users), int(time.monotonic() / 60))


@lru_cache(maxsize=16)  # runs in one folder can be of several users
def _queue(users: frozenset[str], minute: int) -> dict[tuple[str, str], JobState] | UserError:
    # %i is a task's id, as 12_0; -r gives each task a line of its own; a script can have any name
    form = "--format=%i|%T|%r|%o"
    try:
        shown = _ask("squeue", f"--user={','.join(sorted(users))}", "--noheader", "-r", form)
    except UserError as error:
        return error
    lines = (line.split("|", 3) for line in shown.splitlines() if line.count("|") >= 3)
    return {(job, script): _state(job, state, reason) for job, state, reason, script in lines}


def forget_queue() -> None:
    """Have SLURM asked anew, once something has changed."""
    _queue.cache_clear()


def _state(job: str, state: str, reason: str) -> JobState:
    if state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"):
        return JobState("running", "" if state == "RUNNING" else state.lower(), job)
    return JobState("queued", "" if reason in ("None", "Dependency") else reason, job)


def _ask(*command: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        UserError: it is not there, or refuses.
    """
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"--on slurm: there is no {command[0]} on this machine; log in to one of the cluster's"
        ) from None
    if done.returncode:
        said = done.stderr.strip().replace(f"{command[0]}: error: ", "")
        raise UserError(f"--on slurm: {command[0]}: {said}")
    return done.stdout


@cache
def _tell(problem: str) -> None:
    """Say, once, that SLURM does not answer; on a machine without it that is no news."""
    if shutil.which("squeue"):
        say(problem)


class Slurm:
    """A `places.Place`.

    Args:
        rehearsal: whether what runs there is one, which needs no GPU.
        jobs: how many tasks of an array run at a time; None leaves that to the queue.
        options: what was given to --slurm.

    Raises:
        UserError: a setting is wrong, or SLURM does not answer.
    """

    here = False

    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str]):
        self.settings, self.jobs = settings(options), jobs
        card = self.settings.card
        named = gpus.find(card, "card") if card else None
        self._gpu = None if rehearsal else named
        if isinstance(error := queue([getuser()]), UserError):
            raise error  # what is queued already is not submitted twice, so it has to be known

    def gpu(self) -> Gpu | None:
        """The settings' card."""
        return self._gpu

    def submit(self, works: Sequence[Work], title: str, runs: Path, results: list[str]) -> None:
        """Submit works as arrays that wait for each other; see `places.Place`.

        Raises:
            WorkFailed: SLURM took a part of them only, which is queued.
        """
        forget_queue()  # checks and plans take a while
        batch = Batch(self.settings, self.jobs, title, runs, works)
        steps: set[str] = {step for work in works for step in work.steps}
        batch.check(steps | {"results"} if steps and results else steps, len(works))
        to_train, trained = list[Task](), list[Task]()  # each of the second waits for that of the first in its place
        by_training: dict[str | None, list[Task]] = {}  # what others train, or have trained
        for work in works:
            try:
                tasks = {command.step: Task.of(command, work.outcome) for command in work.commands}
            except UserError as error:
                work.outcome.fail("run", str(error))
                continue
            training, scoring = tasks.get("run"), tasks.get("evaluate")
            if training:
                to_train.append(training)
            if scoring and training:
                trained.append(scoring)
            elif scoring:
                by_training.setdefault(self._training(scoring.folder), []).append(scoring)
        preparing = {task.rows: replace(task, words=[*task.words, "--prepare"]) for task in to_train}
        prepared = batch.submit("prepare", list(preparing.values()))
        last = [batch.submit("run", to_train, f"afterany:{prepared}")]  # it can prepare for itself
        last.append(batch.submit("evaluate", trained, f"aftercorr:{last[0]}"))
        for job, others in by_training.items():
            last.append(batch.submit("evaluate", others, f"afterok:{job}" if job else None))
        if results and batch.folder:
            submitted = (*to_train, *trained, *chain(*by_training.values()))
            runs_of = {run.path: run for task in submitted for run in task.runs}
            shows = Task(RunDir(batch.folder), results, list(runs_of.values()))
            batch.submit("results", [shows], f"afterany:{':'.join(filter(None, last))}")
            say(f"once all is done, {self.log(shows.folder, 'results')} has the results")

    def _training(self, folder: RunDir) -> str | None:
        """The job that trains a run, if there is one yet."""
        return next(iter(self.active([job for job in folder.jobs() if job.step == "run"]) or ()), None)

    @classmethod
    def active(cls, jobs: Sequence[Job]) -> dict[str, JobState] | None:
        """See `queue`."""
        if not jobs:
            return {}
        there = queue(job.user for job in jobs)
        if isinstance(there, UserError):
            _tell(str(there))
            return None
        return {job.id: there[job.id, job.script] for job in jobs if (job.id, job.script) in there}

    @classmethod
    def log(cls, folder: RunDir, step: str) -> Path:
        """Of all tries of the step."""
        return folder.path / f"slurm-{step}.log"

    @classmethod
    def cancel(cls, folder: RunDir, jobs: Sequence[Job]) -> list[str]:
        """Cancel the jobs; a training that is going on ends at a checkpoint where it can in SLURM's KillWait."""
        active = cls.active(jobs)
        ids = list(dict.fromkeys(job.id for job in jobs if job.id in (active or {})))
        if ids:
            _ask("scancel", *ids)
            forget_queue()
        return [f"job {id_} is cancelled" for id_ in ids]


@dataclass
class Task:
    """A task of an array.

    Attributes:
        folder: where its log goes.
        words: the command line behind `recipe`.
        runs: among whose jobs it is noted.
        outcome: where it is noted, too.
        rows: see `Command`.
    """

    folder: RunDir
    words: list[str]
    runs: list[RunDir]
    outcome: Outcome | None = None
    rows: str = ""

    @classmethod
    def of(cls, command: Command, outcome: Outcome) -> "Task":
        """The task that carries out a command of a run."""
        return cls(command.folder, command.words, [command.folder], outcome, command.rows)


class Batch:
    """The scripts of one submission, in a folder of their own, and the jobs that they became.

    Args:
        settings: how.
        jobs: how many tasks of an array run at a time; None leaves that to the queue.
        title: what is submitted.
        runs: the folder with the runs.
        works: what it is for; all of them train on as many GPUs and nodes.
    """

    def __init__(self, settings: Settings, jobs: int | None, title: str, runs: Path, works: Sequence[Work]):
        self.settings, self.jobs, self.title, self.runs = settings, jobs, title.replace("/", "-"), runs
        self.gpus, self.nodes = (works[0].gpus, works[0].nodes) if works else (0, 1)
        self.folder: Path | None = None
        self.submitted: list[str] = []

    def check(self, steps: Container[str], tasks: int) -> None:
        """Ask sbatch whether it would take the jobs.

        Args:
            steps: those that may come.
            tasks: the most that each may have.

        Raises:
            UserError: it would not.
        """
        for step in STEPS:
            if step not in steps:
                continue
            count = tasks if step != "results" else 1
            options = self._options(step, count)
            command = ["sbatch", "--test-only", *options]
            done = subprocess.run(command, input=self.script(step, [], count), capture_output=True, text=True)
            if done.returncode:
                said = "; ".join(done.stderr.strip().replace("sbatch: error: ", "").splitlines())
                shown = ("--array", "--gres", "--nodes", *(f"--{key}" for key in self._of_site(step)))
                asked = " ".join(option for option in options if option.startswith(shown))
                remedy = f"--slurm KEY=VALUE or {settings_file()} changes that"
                raise UserError(
                    f"--on slurm: sbatch refuses to {_DOES[step]}: {said}; it was asked for {asked}; {remedy}"
                )

    def submit(self, step: str, tasks: Sequence[Task], after: str | None = None) -> str | None:
        """Submit an array; its id, or None where there is no task.

        Args:
            after: the jobs that have to come before, if there is any task to wait for them.

        Raises:
            WorkFailed: sbatch refuses it now.
        """
        if not tasks:
            return None
        self.folder = self.folder or new_folder(self.runs / "slurm", self.title)
        file = (self.folder / f"{len(self.submitted) + 1}-{step}.sh").resolve()
        write_atomically(file, self.script(step, tasks, len(tasks)))
        waits = [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
        options = self._options(step, len(tasks))  # once more: SBATCH_ variables are stronger than those in a script
        try:
            job = _ask("sbatch", "--parsable", *options, *waits, str(file)).strip().partition(";")[0]
        except UserError as error:
            queued = f"; job {', '.join(self.submitted)} is queued already" if self.submitted else ""
            raise WorkFailed(f"{error}{queued}; the same command goes on") from None
        self.submitted.append(job)
        say(f"job {job}: {_DOES[step]}, {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}; {file}")
        for i, task in enumerate(tasks):
            id_ = f"{job}_{i}"
            noted = Job(place="slurm", id=id_, step=step, user=getuser(), script=str(file), words=task.words)
            for run in task.runs:
                run.add_job(noted)
            if task.outcome:
                task.outcome.steps[step] = f"queued (job {id_})"
        forget_queue()
        return job

    def script(self, step: str, tasks: Sequence[Task], count: int) -> str:
        """The script of an array.

        Args:
            step: what its tasks do.
            tasks: the tasks.
            count: how many there are, or will be.
        """
        site, nodes = self.settings, self.nodes if step == "run" else 1
        recipe = f"{site.prefix} recipe" if site.prefix else shlex.quote(str(Path(sys.executable).with_name("recipe")))
        if nodes > 1:
            cores = "${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"  # srun does not inherit it
            recipe = f"srun --nodes={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 {cores} {recipe}"
        return (
            environment(paths.TEMPLATES)
            .get_template("slurm.sh.j2")
            .render(
                title=self.title,
                step=step,
                options=map(shlex.quote, self._options(step, count)),
                setup=site.setup,
                cwd=shlex.quote(str(Path.cwd())),
                tasks=[
                    {
                        "folder": shlex.quote(str(task.folder.path)),
                        "log": shlex.quote(str(Slurm.log(task.folder, step))),
                        "words": shlex.join(task.words),
                    }
                    for task in tasks
                ],
                nodes=nodes,
                launcher=recipe,
            )
        )

    def _of_site(self, step: str) -> dict[str, str]:
        return self.settings.options | self.settings.of_step.get(step, {})

    def _options(self, step: str, count: int) -> list[str]:
        """The options of a step's job, as sbatch takes them."""
        gpus = {"run": self.gpus, "evaluate": min(self.gpus, 1)}.get(step, 0)
        limit = f"%{self.jobs}" if self.jobs and step in ("run", "evaluate") else ""
        site = {key: value for key, value in self._of_site(step).items() if gpus or "{gpus}" not in value}
        options = {
            "job-name": f"{self.title}-{step}",
            "output": str((self.folder or Path.cwd()) / "%x-%A_%a.log"),
            "open-mode": "append",
            "array": f"0-{count - 1}{limit}",
            "nodes": str(self.nodes if step == "run" else 1),
            "ntasks-per-node": "1",
            "requeue": "",
            "signal": f"B:USR1@{GRACE}",
        }
        asks_itself = site.keys() & {"gpus", "gpus-per-node", "gpus-per-task"} or "gpu" in site.get("gres", "")
        if gpus and not asks_itself:
            options["gres"] = ",".join(filter(None, (site.get("gres"), f"gpu:{gpus}")))
            site = {key: value for key, value in site.items() if key != "gres"}
        if not gpus and not asks_itself:  # sbatch refuses these where there is no GPU
            site = {key: value for key, value in site.items() if not key.endswith("-per-gpu")}
        options |= {key: value.replace("{gpus}", str(gpus)) for key, value in site.items()}
        return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]


_DOES = {"prepare": "prepare rows", "run": "train", "evaluate": "evaluate", "results": "show the results"}
