"""What SLURM's commands say, and the states of the jobs in its queue."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache

from ..base.errors import UserError
from ..base.progress import say
from ..runs.records import Job, JobState

PATIENCE = 60  # seconds that a command of SLURM may take


def active(jobs: Sequence[Job]) -> dict[str, JobState] | None:
    """The states of those jobs that have not ended, by id, in their order; None where SLURM does not answer."""
    if not jobs:
        return {}
    states = queue(job.user for job in jobs)
    if isinstance(states, UserError):
        _report_once(str(states))
        return None
    return {job.id: states[job.id, job.script] for job in jobs if (job.id, job.script) in states}


def cancel(jobs: Sequence[Job]) -> list[str]:
    """Cancel jobs; a message for each. A running training ends at a checkpoint if KillWait leaves it time to."""
    if ids := list(active(jobs) or {}):
        ask("scancel", *ids)
        forget_queue()
    return [f"job {id_} is cancelled" for id_ in ids]


def queue(users: Iterable[str]) -> dict[tuple[str, str], JobState] | UserError:
    """The states of users' jobs that have not ended, by id and script; an error where SLURM does not answer. It is
    asked once a minute, since it can be slow."""
    return _queue(frozenset(users), int(time.monotonic() / 60))


@lru_cache(maxsize=16)  # runs in one folder can be of several users
def _queue(users: frozenset[str], minute: int) -> dict[tuple[str, str], JobState] | UserError:
    # %i is a task's id, as 12_0; -r gives each task a line of its own; a script can have any name
    form = "--format=%i|%T|%r|%o"
    try:
        shown = ask("squeue", f"--user={','.join(sorted(users))}", "--noheader", "-r", form)
    except UserError as error:
        return error
    lines = (line.split("|", 3) for line in shown.splitlines() if line.count("|") >= 3)
    return {(job, script): _state(job, state, reason) for job, state, reason, script in lines}


def forget_queue() -> None:
    """Have SLURM asked again, once something has changed."""
    _queue.cache_clear()


def _state(job: str, state: str, reason: str) -> JobState:
    if state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"):
        return JobState("running", "" if state == "RUNNING" else state.lower(), job)
    return JobState("queued", "" if reason in ("None", "Dependency") else reason, job)


def call(*command: str, script: str = "") -> "subprocess.CompletedProcess[str]":
    """Run one of SLURM's commands, with a script on its stdin.

    Raises:
        UserError: it is missing, or does not end.
    """
    try:
        return subprocess.run(command, input=script, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except FileNotFoundError:
        raise UserError(
            f"--on slurm: there is no {command[0]} on this machine; log in to a machine of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        problem = f"did not end within {PATIENCE} s; `squeue --me` shows whether it did its work"
        raise UserError(f"--on slurm: {command[0]}: {problem}") from None


def ask(*command: str) -> str:
    """The output of one of SLURM's commands.

    Raises:
        UserError: it is missing, refuses, or does not end.
    """
    done = call(*command)
    if done.returncode:
        problem = done.stderr.strip().replace(f"{command[0]}: error: ", "")
        raise UserError(f"--on slurm: {command[0]}: {problem}")
    return done.stdout


def sbatch(*arguments: str) -> str:
    """Have sbatch submit a job; its id.

    Raises:
        UserError: sbatch is missing, refuses, does not end, or names no id.
    """
    said = ask("sbatch", "--parsable", *arguments)
    if found := re.fullmatch(r"(\d+)(;\S+)?", (said.strip().splitlines() or [""])[-1]):
        return found[1]
    problem = f"said {said[-200:]!r} and not a job's id; `squeue --me` shows whether the job is queued"
    raise UserError(f"--on slurm: sbatch: {problem}")


@cache
def _report_once(problem: str) -> None:
    """Report that SLURM does not answer, unless this machine has no SLURM."""
    if shutil.which("squeue"):
        say(problem)
