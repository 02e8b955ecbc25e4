"""Stopping runs wherever they are running or queued: `recipe cancel`."""

from pathlib import Path

from ..backends import slurm_site
from ..backends.local import stop_holders
from ..base.errors import UserError
from ..data import study
from ..runs.rundir import RunDir, all_runs, find_run, readable
from . import reproduce
from .sweep import find_sweep


def cancel(names: list[str], sweep: str | None, of_study: str | None, runs: Path) -> list[str]:
    """Ask runs to stop, and their evaluations; a message for each thing that was asked.

    Args:
        names: runs, see `find_run`.
        sweep: every run of this sweep instead.
        of_study: every run of this study's recipes instead.
        runs: the folder with the runs.

    Raises:
        UserError: a name is wrong, or nothing is running or queued.
    """
    messages = []  # first those of a command that begins the next run when one ends
    if sweep:
        messages = stop_holders([find_sweep(sweep, runs).lock(runs)])
    elif of_study:
        of_study = study.find(of_study).folder.name
        messages = stop_holders([reproduce.lock(of_study, runs)])
    folders = [find_run(name, runs) for name in names] or ([] if messages else _meant(sweep, of_study, runs))
    for folder in folders:
        jobs = folder.jobs()
        asked = slurm_site.cancel(jobs) + stop_holders(folder.path.rglob("*lock"), {job.id for job in jobs})
        messages += [f"{folder.path}: {message}" for message in asked]
    if not messages:
        of_runs = ", ".join(str(folder.path) for folder in folders) if names else sweep or of_study
        raise UserError(f"{of_runs}: nothing is running or queued")
    return messages


def _meant(sweep: str | None, of_study: str | None, runs: Path) -> list[RunDir]:
    if sweep:
        record = find_sweep(sweep, runs)
        digests = {member.digest for member in record.members}
        return [folder for folder, run in readable(all_runs(runs / record.recipe)) if run.digest in digests]
    return [folder for folder, run in readable(all_runs(runs)) if run.origin.startswith(f"{of_study}/")]
