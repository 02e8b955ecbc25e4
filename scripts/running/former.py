"""Runs of a config that were made before, which are not made again."""

from pathlib import Path

from .. import backends
from ..base.errors import UserError
from ..runs.lookup import all_runs, note_versions
from ..runs.rundir import Run, RunDir


def by_digest(runs: Path, recipe: str) -> dict[str, tuple[RunDir, Run]]:
    """The runs of a recipe by the digest of config and data: the newest of each, but a finished one before others.

    Runs with several ranks or with arguments for Axolotl are left out: their digests do not cover these.
    """
    former: dict[str, tuple[RunDir, Run]] = {}
    for folder in all_runs(runs / recipe):
        try:
            run = backends.read(folder)
        except UserError:  # damaged, which `recipe results` reports
            continue
        plain = run.recipe == recipe and run.ranks == 1 and not run.axolotl_arguments
        if run.digest is None or not plain:
            continue
        if run.digest not in former or run.state == "finished" or former[run.digest][1].state != "finished":
            former[run.digest] = (folder, run)
    note_versions(former.values())
    return former
