"""A SLURM cluster: settings for jobs, SLURM commands, and job states in the queue."""

import re
import subprocess
import time
from collections.abc import Sequence
from functools import lru_cache
from getpass import getuser
from pathlib import Path
from typing import Annotated, get_args

import yaml
from pydantic import AfterValidator, BaseModel, StringConstraints, ValidationError

from ...base import paths, yamlfiles
from ...base.errors import UserError
from ...base.secrets import is_secret
from ...base.terminal import say_once
from ...base.yamlfiles import Config
from ...config.merging import flatten, merge
from ...training.run_record import Job, JobState
from . import Step

NAME = "slurm"
STEPS: tuple[Step, ...] = get_args(Step)
_OWN = {  # options that `recipe` sets for each job, or that would hide the job's id
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "output"),
    *("clusters", "parsable", "test-only", "wait", "wrap"),
}
TIMEOUT = 60  # seconds for a SLURM command


def _allowed(option: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
        raise ValueError(f"{option!r} is not a long option of sbatch")
    if option in _OWN:
        raise ValueError(f"{option} cannot be set here; `recipe` controls this option")
    return option


_Line = Annotated[str, StringConstraints(pattern="^.*$")]
_Options = dict[Annotated[str, AfterValidator(_allowed)], _Line]


class Cluster(BaseModel):
    """Settings of the jobs at a cluster.

    Attributes:
        gpu: GPU of the jobs, used for checks and plans.
        prefix: text before `recipe` in a job, such as `apptainer exec --nv IMAGE`; None if jobs run in the environment
            of this command.
        setup: shell commands at the start of each job, one or several lines.
        options: values of sbatch's long options by name. {gpus} in a value stands for the number of GPUs per node. An
            option with an empty value is passed without a value.
        of_step: additional options for single steps.
    """

    gpu: _Line | None = None
    prefix: _Line | None = None
    setup: str | list[str] = []
    options: _Options = {}
    of_step: dict[Step, _Options] = {}


def settings_file() -> Path:
    """File with the user's SLURM settings."""
    return paths.user_config() / "slurm.yaml"


def cluster_settings(overrides: Sequence[str]) -> Cluster:
    """Settings from the user's file, overridden by the options of --on.

    Raises:
        UserError: the file or an option is malformed.
    """
    file = settings_file()
    content = _read(file) if file.is_file() else {}
    cluster = _cluster(content, str(file))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--on slurm,{text}: expected key=value, as in --on slurm,partition=gpu")
        step, dot, option = key.partition(".")
        content = merge(content, {step: {option: value}} if dot else {key: value})
        cluster = _cluster(content, f"--on slurm,{text}")
    return cluster


def _read(file: Path) -> Config:
    """Read a mapping with values as text; YAML would turn 12:00:00 into a number."""
    content = yamlfiles.parse(yamlfiles.read_text(file), file, yaml.BaseLoader) or {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping of sbatch's long options to values")
    return content


def _cluster(content: Config, where: str) -> Cluster:
    cluster: Config = {"options": {}, "of_step": {}}
    for key, value in content.items():
        if key in ("gpu", "prefix", "setup"):
            cluster[key] = value
        else:
            cluster["of_step" if key in STEPS else "options"][key] = value
    for key, value in flatten(content):
        if is_secret(key, value):
            raise UserError(f"{where}: {key}: a secret, which would be stored in the job's script; export it instead")
    try:
        return Cluster.model_validate(cluster)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {' '.join(map(str, first['loc']))}: {first['msg']}") from None


def state_of(job: Job) -> JobState | None:
    """State of a job; None if it has ended, and unknown if SLURM does not answer."""
    states = queue()
    if isinstance(states, UserError):
        say_once(str(states))
        return JobState("unknown", "unknown: the queue does not answer")
    return states.get((job.id, job.script))


def queue() -> dict[tuple[str, str], JobState] | UserError:
    """States of this user's unfinished jobs, each under its pair of id and script; or an error. Cached for a minute."""
    return _queue(int(time.monotonic() / 60))


def require_answer() -> None:
    """Raise UserError if SLURM does not answer: a queued run could then be submitted again."""
    if isinstance(error := queue(), UserError):
        raise error


@lru_cache(maxsize=1)
def _queue(minute: int) -> dict[tuple[str, str], JobState] | UserError:
    # %i is a task's id, such as 12_0; -r prints one line per task; %o, the script, can contain any character
    form = "--format=%i|%T|%r|%o"
    try:
        shown = ask("squeue", f"--user={getuser()}", "--noheader", "-r", form)
    except UserError as error:
        return error
    lines = (line.split("|", 3) for line in shown.splitlines() if line.count("|") >= 3)
    return {(job, script): _state(job, state, reason) for job, state, reason, script in lines}


def forget_queue() -> None:
    """Forget cached job states after a change."""
    _queue.cache_clear()


def _state(job: str, state: str, reason: str) -> JobState:
    if state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"):
        return JobState("running", "" if state == "RUNNING" else state.lower(), job, NAME)
    is_informative = reason not in ("None", "Dependency")  # another program's text
    return JobState("queued", reason if is_informative else "", job, NAME)


def ask(*command: str, script: str = "") -> str:
    """Run a SLURM command with a script on stdin; return its output.

    Raises:
        UserError: the command is missing, fails, or does not end in time.
    """
    where = f"--on slurm: {command[0]}"
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except (FileNotFoundError, PermissionError):  # the second if PATH has a folder that this user cannot read
        raise UserError(f"{where}: not found on this machine; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{where}: no answer within {TIMEOUT} s; check with `squeue --me` whether it took effect"
        ) from None
    if done.returncode:
        problem = done.stderr.strip().replace(f"{command[0]}: error: ", "")
        raise UserError(f"{where}: {'; '.join(problem.splitlines())}")
    return done.stdout


def sbatch(*arguments: str) -> str:
    """Submit a job with sbatch and return its id.

    Raises:
        UserError: sbatch is missing, fails, does not end in time, or prints no id.
    """
    output = ask("sbatch", "--parsable", *arguments)
    ids = set[str](re.findall(r"^(\d+)(?:;\S+)?\s*$", output, re.MULTILINE))  # another program's text
    if len(ids) == 1:
        return ids.pop()
    problem = f"printed {output[-200:]!r} instead of a job id; check with `squeue --me` whether the job is queued"
    raise UserError(f"--on slurm: sbatch: {problem}")
