"""Cancelling runs, sweeps and reproductions."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..base import paths

if TYPE_CHECKING:
    from ..data.studies import Study
    from ..run.rundir import RunDir
    from .sweep import Sweep


def cancel(thing: "RunDir | Sweep | Study") -> list[str]:
    """Ask a run, or the runs of a sweep or study, to stop; return a message per process or job."""
    from ..run.backends import slurm_site, stop_holders

    locks, folders = _locks_and_runs(thing, paths.runs())
    if messages := stop_holders(locks):  # first stop the commands that would start the next run
        return messages
    for folder in folders:
        # ask each run only once: a second request would stop training without a checkpoint
        asked = slurm_site.cancel(folder.jobs()) or stop_holders(folder.path.rglob("*lock"))
        messages += [f"{folder.path}: {message}" for message in asked]
    return messages


def _locks_and_runs(thing: "RunDir | Sweep | Study", runs: Path) -> "tuple[list[Path], Iterable[RunDir]]":
    """Return the locks of the commands that start a sweep's or study's runs, and these runs."""
    from ..run.rundir import RunDir, all_runs, readable
    from . import reproduce
    from .sweep import Sweep, recorded_sweeps

    if isinstance(thing, RunDir):
        return [], [thing]
    if isinstance(thing, Sweep):
        digests = {member.digest for member in thing.members}
        members = (folder for folder, run in readable(all_runs(runs / thing.recipe)) if run.digest in digests)
        return [thing.lock(runs)], members
    study = f"{thing.folder.name}/"
    sweeps = [sweep for sweep in recorded_sweeps().values() if sweep.recipe.startswith(study)]
    of_study = (folder for folder, run in readable(all_runs(runs)) if run.origin.startswith(study))
    return [reproduce.lock(thing.folder.name), *(sweep.lock(runs) for sweep in sweeps)], of_study
