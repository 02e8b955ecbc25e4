"""`recipe cancel`: stop running and queued runs."""

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
    if isinstance(thing, RunDir):
        folders = [thing]
    else:  # first stop the command that would start the next run
        locks = [thing.lock(paths.runs())] if isinstance(thing, Sweep) else [reproduce.lock(thing.folder.name)]
        if isinstance(thing, Study):
            of_study = (
                sweep for sweep in recorded_sweeps().values() if sweep.recipe.startswith(f"{thing.folder.name}/")
            )
            locks += [sweep.lock(paths.runs()) for sweep in of_study]
        if messages := stop_holders(locks):
            return messages
        folders = _members(thing) if isinstance(thing, Sweep) else _of_study(thing)
    messages = []
    for folder in folders:
        # ask each run only once: a second request would stop training without a checkpoint
        asked = slurm_site.cancel(folder.jobs()) or stop_holders(folder.path.rglob("*lock"))
        messages += [f"{folder.path}: {message}" for message in asked]
    return messages


def _members(sweep: Sweep) -> list[RunDir]:
    digests = {member.digest for member in sweep.members}
    return [folder for folder, run in readable(all_runs(paths.runs() / sweep.recipe)) if run.digest in digests]


def _of_study(study: Study) -> list[RunDir]:
    name = study.folder.name
    return [folder for folder, run in readable(all_runs(paths.runs())) if run.origin.startswith(f"{name}/")]
