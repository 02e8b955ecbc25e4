"""Removal of run folders and checkpoints."""

import shutil
from pathlib import Path

from ..base.errors import UserError
from ..base.run_files import RunFile
from . import backends
from .rundir import RunDir


def removable(folder: RunDir, checkpoints: bool) -> list[Path]:
    """Folders of a run that can be removed: its own, or only its checkpoints.

    Raises:
        UserError: the run is running or queued.
    """
    state = backends.read(folder).state
    if state in ("running", "queued"):
        remedy = f"stop it with `recipe cancel {folder.quoted}` first"
        raise UserError(f"not removed: the run is {state}", file=folder.path, remedy=remedy)
    if checkpoints:
        return sorted(folder.output.glob(RunFile.CHECKPOINT.format("*")))
    return [folder.path]


def size(place: Path) -> int:
    """Bytes of the files in a folder, without those behind links."""
    return sum(file.lstat().st_size for file in place.rglob("*") if not file.is_dir())


def remove(folder: RunDir, places: list[Path]) -> None:
    """Remove folders of a run.

    Raises:
        UserError: the run has been started in the meantime.
    """
    with folder.held():
        for place in places:
            shutil.rmtree(place)
