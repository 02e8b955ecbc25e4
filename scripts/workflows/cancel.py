"""`recipe cancel`: stop running and queued runs."""

from collections.abc import Iterator
from pathlib import Path

from ..backends import slurm_site, stop_holders
from ..base import paths
from ..base.errors import UserError
from ..data.study import Study
from ..runs.rundir import RunDir, all_runs, readable
from . import reproduce
from .sweep import Sweep, find_any, recorded_sweeps


def cancel(names: list[str]) -> list[str]:
    """Ask runs, sweeps and studies to stop; return a message per process or job.

    Args:
        names: names of runs, sweeps or studies, see `find_any`.

    Raises:
        UserError: a name is wrong, or nothing is running or queued.
    """
    messages = [message for name in names for message in _cancelled(find_any(name))]
    if not messages:
        raise UserError(f"{', '.join(names)}: nothing is running or queued")
    return messages


def _cancelled(thing: RunDir | Sweep | Study) -> list[str]:
    locks, folders = _locks_and_runs(thing, paths.runs())
    if messages := stop_holders(locks):  # first stop the commands that would start the next run
        return messages
    for folder in folders:
        # ask each run only once: a second request would stop training without a checkpoint
        asked = slurm_site.cancel(folder.jobs()) or stop_holders(folder.path.rglob("*lock"))
        messages += [f"{folder.path}: {message}" for message in asked]
    return messages


def _locks_and_runs(thing: RunDir | Sweep | Study, runs: Path) -> tuple[list[Path], Iterator[RunDir]]:
    """Return the locks of the commands that start a sweep's or study's runs, and these runs."""
    if isinstance(thing, RunDir):
        return [], iter([thing])
    if isinstance(thing, Sweep):
        digests = {member.digest for member in thing.members}
        members = (folder for folder, run in readable(all_runs(runs / thing.recipe)) if run.digest in digests)
        return [thing.lock(runs)], members
    name = thing.folder.name
    sweeps = [sweep for sweep in recorded_sweeps().values() if sweep.recipe.startswith(f"{name}/")]
    of_study = (folder for folder, run in readable(all_runs(runs)) if run.origin.startswith(f"{name}/"))
    return [reproduce.lock(name), *(sweep.lock(runs) for sweep in sweeps)], of_study
