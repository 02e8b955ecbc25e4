"""Stopping runs wherever they are going on or queued: `recipe cancel`."""

from pathlib import Path

from .. import places
from ..base.errors import UserError
from ..data import study
from ..places.local import stop_holders
from ..runs import lookup
from ..runs.lookup import all_runs, find_run
from ..runs.rundir import RunDir
from . import reproduce, sweeps


def cancel(names: list[str], sweep: str | None, of_study: str | None, runs: Path) -> list[str]:
    """Ask runs to end, and their evaluations; what was asked, a line each.

    Args:
        names: runs, see `find_run`.
        sweep: every run of this sweep instead.
        of_study: every run of this study's recipes instead.
        runs: the folder with the runs.

    Raises:
        UserError: not just one of these is given, a name is wrong, or nothing is going on.
    """
    if sum(map(bool, (names, sweep, of_study))) != 1:
        raise UserError("give RUNs, --sweep NAME or --study S")
    asked = []  # first a command that goes on with the next run when one ends
    if sweep:
        asked = stop_holders([sweeps.find(sweep, runs).lock(runs)])
    elif of_study:
        study.find(of_study)  # that there is such a study
        asked = stop_holders([reproduce.lock(of_study, runs)])
    folders = [find_run(name, runs) for name in names] or ([] if asked else _meant(sweep, of_study, runs))
    asked += [f"{folder.path}: {what}" for folder in folders for what in places.cancel(folder, not names)]
    if not asked:
        of_runs = ", ".join(str(folder.path) for folder in folders) if names else sweep or of_study
        raise UserError(f"{of_runs}: nothing of it is going on or queued")
    return asked


def _meant(sweep: str | None, of_study: str | None, runs: Path) -> list[RunDir]:
    if sweep:
        made = sweeps.find(sweep, runs)
        digests = {member.digest for member in made.members}
        return [folder for folder, run in lookup.readable(all_runs(runs / made.recipe)) if run.digest in digests]
    return [folder for folder, run in lookup.readable(all_runs(runs)) if run.origin.startswith(f"{of_study}/")]
