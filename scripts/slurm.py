"""A cluster's queue, SLURM: `--on slurm`.

Jobs are scripts rendered from templates/slurm.sh.j2, kept with their logs below runs/slurm/, and given to sbatch: an
array each for preparing the rows, for training, and for evaluating, every task of which waits for its own training; at
last a job that shows the results. A job that nears its time limit, is preempted or requeued goes on from the last
whole checkpoint.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from getpass import getuser
from pathlib import Path
from typing import Any

import yaml

from . import config, gpus, paths
from .errors import UserError, WorkFailed
from .files import write_atomically
from .gpus import Gpu
from .places import Command, Outcome, Step, Work
from .progress import say
from .rundir import Job, RunDir, new_folder
from .templating import environment

GRACE = 300  # seconds before a time limit in which a training can end at a checkpoint; --slurm signal=... sets others
STEPS = ("prepare", "run", "evaluate", "results")
_OURS = {  # options that each job has its own of, or that would keep its id from being known
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "output"),
    *("clusters", "parsable", "test-only", "wait", "wrap"),
}
_OWN = ("card", "prefix", "setup")  # keys of the settings that are no options of sbatch


def settings_file() -> Path:
    """The user's settings for the clusters that they use."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qlora-recipes" / "slurm.yaml"


@dataclass
class Settings:
    """How jobs are submitted on a site.

    Attributes:
        card: the GPU that jobs get, to check and plan for.
        prefix: what stands before `recipe` in a job, as a container's `apptainer exec --nv IMAGE`; None where the
            environment of this command is there too.
        setup: lines of shell for the beginning of a job.
        options: sbatch's long options and their values, {gpus} in which is the number of GPUs on a node; an empty value
            gives the option without one.
        of_step: further options for a step alone.
    """

    card: str | None = None
    prefix: str | None = None
    setup: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    of_step: dict[str, dict[str, str]] = field(default_factory=dict)


def settings(given: Sequence[str]) -> Settings:
    """The settings of the user's file, with what was given to --slurm laid over.

    Raises:
        UserError: the file or an option has another form.
    """
    file, found = settings_file(), Settings()
    for key, value in (_read(file) if file.is_file() else {}).items():
        _set(found, key, value, f"{file}: {key}")
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--slurm {text}: expected key=value, as in --slurm partition=gpu")
        step, dot, option = key.partition(".")
        _set(found, step if dot else key, {option: value} if dot else value, f"--slurm {text}")
    return found


def _read(file: Path) -> dict[str, Any]:
    """A mapping whose values are text, as they stand there: YAML would read 12:00:00 as a number."""
    try:
        content = yaml.load(config.read_text(file), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping of sbatch's long options to values")
    return content


def _set(found: Settings, key: str, value: Any, where: str) -> None:
    if key in STEPS:
        if not isinstance(value, dict) or any(not isinstance(text, str) for text in value.values()):
            raise UserError(f"{where}: options for the step {key} are a mapping of their own")
        for option in value:
            _check_option(option, where)
        found.of_step[key] = found.of_step.get(key, {}) | value
    elif key == "setup":
        found.setup = value.splitlines() if isinstance(value, str) else value
        if not isinstance(found.setup, list) or any(not isinstance(line, str) for line in found.setup):
            raise UserError(f"{where}: expected lines of shell")
    elif isinstance(value, dict):
        raise UserError(f"{where}: no step of that name; there are {', '.join(STEPS)}")
    elif not isinstance(value, str) or "\n" in value:
        raise UserError(f"{where}: expected one line of text")
    elif key in _OWN:
        setattr(found, key, value)
    else:
        _check_option(key, where)
        found.options[key] = value


def _check_option(option: str, where: str) -> None:
    if option in _OURS:
        instead = "; --nodes sets it" if option == "nodes" else ""
        raise UserError(f"{where}: {option} is not for jobs of this command to have from outside{instead}")


@cache
def queue(users: frozenset[str]) -> dict[tuple[str, str], str] | UserError:
    """The states of the jobs of users that are not at their end, by id and script; an error where SLURM does not
    answer, which it takes its time for."""
    # %i is a task's id, as 12_0; -r gives each task a line of its own
    form = "--format=%i|%o|%T|%r"
    try:
        shown = _ask("squeue", f"--user={','.join(sorted(users))}", "--noheader", "-r", form)
    except UserError as error:
        return error
    lines = (line.split("|") for line in shown.splitlines())
    return {(job, script): _state(state, reason) for job, script, state, reason in lines}


def _state(state: str, reason: str) -> str:
    if state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"):
        return "running" if state == "RUNNING" else f"running: {state.lower()}"
    return f"queued: {reason}" if reason not in ("None", "Dependency") else "queued"


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
        if isinstance(error := queue(frozenset([getuser()])), UserError):
            raise error  # what is queued already is not submitted twice, so it has to be known

    def gpu(self) -> Gpu | None:
        """The settings' card."""
        return self._gpu

    def submit(self, works: Sequence[Work], title: str, runs: Path, results: list[str]) -> None:
        """Submit works as arrays that wait for each other; see `places.Place`.

        Raises:
            WorkFailed: SLURM took a part of them only, which is queued.
        """
        if not works:
            return
        queue.cache_clear()  # checks and plans take a while
        batch = Batch(self.settings, self.jobs, title, runs, works[0].gpus, works[0].nodes)
        batch.check(len(works))
        trained, evaluated, to_train = list[_Task](), list[_Task](), list[_Task]()
        for work in works:
            try:
                commands = {command.step: command for command in work.commands}
            except UserError as error:
                work.outcome.fail("run", str(error))
                continue
            if "run" in commands:
                to_train.append((work.outcome, commands["run"]))
            if "evaluate" in commands:
                (trained if "run" in commands else evaluated).append((work.outcome, commands["evaluate"]))
        by_rows = {command.rows: (outcome, command) for outcome, command in to_train}
        prepared = batch.submit("prepare", list(by_rows.values()))
        training = batch.submit("run", to_train, f"afterany:{prepared}")  # it can prepare for itself
        scoring = [batch.submit("evaluate", trained, f"aftercorr:{training}"), batch.submit("evaluate", evaluated)]
        if last := [job for job in (training, *scoring) if job]:
            batch.submit_results(results, f"afterany:{':'.join(last)}")

    @classmethod
    def active(cls, jobs: Sequence[Job]) -> dict[str, str] | None:
        """See `queue`."""
        there = queue(frozenset(job.user for job in jobs))
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
        if not jobs:
            return []
        active = cls.active(jobs)
        ids = list(dict.fromkeys(job.id for job in jobs if job.id in (active or {})))
        if ids:
            _ask("scancel", *ids)
            queue.cache_clear()
        return [f"job {id_} is cancelled" for id_ in ids]


_Task = tuple[Outcome, Command]


class Batch:
    """The scripts of one submission, in a folder of their own, and the jobs that they became.

    Args:
        settings: how.
        jobs: how many tasks of an array run at a time; None leaves that to the queue.
        title: what is submitted.
        runs: the folder with the runs.
        gpus: how many of them a training needs on each node.
        nodes: how many of those.
    """

    def __init__(self, settings: Settings, jobs: int | None, title: str, runs: Path, gpus: int, nodes: int):
        self.settings, self.jobs, self.title, self.runs = settings, jobs, title.replace("/", "-"), runs
        self.gpus, self.nodes = gpus, nodes
        self.folder: Path | None = None
        self.submitted: list[str] = []
        self.scripts: list[Path] = []
        self.runs_of: dict[Path, RunDir] = {}

    def check(self, tasks: int) -> None:
        """Ask sbatch whether it would take the jobs.

        Raises:
            UserError: it would not.
        """
        for step in STEPS:
            count = tasks if step != "results" else 1
            command = ["sbatch", "--test-only", *self._options(step, count)]
            done = subprocess.run(command, input=self.script(step, [], count), capture_output=True, text=True)
            if done.returncode:
                said = "; ".join(done.stderr.strip().replace("sbatch: error: ", "").splitlines())
                shown = ("--array", "--gres", "--nodes", *(f"--{key}" for key in self._of_site(step)))
                asked = " ".join(option for option in self._options(step, tasks) if option.startswith(shown))
                remedy = f"--slurm KEY=VALUE or {settings_file()} changes that"
                raise UserError(
                    f"--on slurm: sbatch refuses to {_DOES[step]}: {said}; it was asked for {asked}; {remedy}"
                )

    def submit(self, step: Step, tasks: list[_Task], after: str | None = None) -> str | None:
        """Submit an array of which each task is a command; its id, or None where there is no task.

        Args:
            after: the jobs that have to come before, if there is any task to wait for them.
        """
        if not tasks:
            return None
        job = self._sbatch(step, [(command.folder.path, _words(step, command)) for _, command in tasks], after)
        for i, (outcome, command) in enumerate(tasks):
            self._note(command.folder, step, f"{job}_{i}")
            outcome.steps[step] = f"queued (job {job}_{i})"
        self.runs_of |= {command.folder.path: command.folder for _, command in tasks}
        return job

    def _note(self, folder: RunDir, step: str, job: str) -> None:
        folder.add_job(Job(place="slurm", id=job, step=step, user=getuser(), script=str(self.scripts[-1].resolve())))

    def submit_results(self, words: list[str], after: str) -> None:
        """Submit the command that shows the results, if there is one."""
        if not words:
            return
        folder = self._folder()
        job = self._sbatch("results", [(folder, words)], after)
        for run in self.runs_of.values():
            self._note(run, "results", f"{job}_0")
        say(f"once all is done, {Slurm.log(RunDir(folder), 'results')} has the results")

    def _sbatch(self, step: str, tasks: list[tuple[Path, list[str]]], after: str | None) -> str:
        file = self._folder() / f"{len(self.submitted) + 1}-{step}.sh"
        write_atomically(file, self.script(step, tasks, len(tasks)))
        waits = [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
        try:
            options = self._options(
                step, len(tasks)
            )  # once more: SBATCH_ variables are stronger than those in a script
            job = _ask("sbatch", "--parsable", *options, *waits, str(file.resolve())).strip().partition(";")[0]
        except UserError as error:
            queued = f"; job {', '.join(self.submitted)} is queued already" if self.submitted else ""
            raise WorkFailed(f"{error}{queued}; the same command goes on") from None
        self.submitted.append(job)
        self.scripts.append(file)
        say(f"job {job}: {_DOES[step]}, {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}; {file}")
        return job

    def _folder(self) -> Path:
        """The folder for the scripts, and for what they say before their command begins."""
        self.folder = self.folder or new_folder(self.runs / "slurm", self.title)
        return self.folder

    def script(self, step: str, tasks: list[tuple[Path, list[str]]], count: int) -> str:
        """The script of an array.

        Args:
            step: what its tasks do.
            tasks: a run's folder and the words behind `recipe` for each.
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
                        "folder": shlex.quote(str(folder)),
                        "log": shlex.quote(str(Slurm.log(RunDir(folder), step))),
                        "words": shlex.join(words),
                    }
                    for folder, words in tasks
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
        site = self._of_site(step)
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


def _words(step: str, command: Command) -> list[str]:
    return [*command.words, "--prepare"] if step == "prepare" else command.words


_DOES = {"prepare": "prepare rows", "run": "train", "evaluate": "evaluate", "results": "show the results"}
