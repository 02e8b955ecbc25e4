"""Removal of run folders and checkpoints."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from ..base import paths
from ..base.errors import UserError
from ..base.run_files import RunFile
from . import backends
from .rundir import RunDir, all_runs, find_run

_IN_OUTPUT = (
    RunFile.ADAPTER,
    RunFile.ADAPTER_CONFIG,
    RunFile.CHECKPOINT,
    RunFile.MANIFEST,
    RunFile.MERGED,
    RunFile.GGUF,
)
_COMMANDS = ("prepare", "run", "evaluate", "merge", "export")
_FILES = [name.format("*") for name in RunFile if name not in (*_IN_OUTPUT, RunFile.COMMAND_LOG, RunFile.LOCK)]
_FILES += [".*.part", *map(RunFile.COMMAND_LOG.format, _COMMANDS)]
"""Patterns of what commands and Axolotl write into a run's folder."""


def find(name: str) -> RunDir:
    """The run that a name means; `latest` is the only name that may mean the newest of several runs.

    Raises:
        UserError: no run, or more than one, has the name.
    """
    folder = find_run(name, paths.runs())
    if name == "latest" or Path(name).name in folder.path.name:
        return folder
    runs = [run.path.name for run in all_runs(folder.path.parent)]
    if len(runs) > 1:
        raise UserError(
            f"there are {len(runs)} such runs: {', '.join(runs)}", key=name, remedy="name the ones to remove"
        )
    return folder


def removable(folder: RunDir, checkpoints: bool) -> list[Path]:
    """Files and folders of a run that can be removed, or only its checkpoints; files of others are left out.

    run.json is the last but the lock: an interrupted removal leaves a run, for which the command can be repeated.

    Raises:
        UserError: the folder is a link, or the run is running or queued.
    """
    if folder.path.is_symlink():
        raise UserError("is a link", file=folder.path, remedy=f"name the folder {folder.path.resolve()}")
    state = backends.read(folder).state
    if state in ("running", "queued"):
        remedy = f"stop it with `recipe cancel {folder.quoted}` first"
        raise UserError(f"not removed: the run is {state}", file=folder.path, remedy=remedy)
    if checkpoints:
        return sorted(folder.output.glob(RunFile.CHECKPOINT.format("*")))
    files = [file for file in folder.path.iterdir() if any(fnmatch(file.name, pattern) for pattern in _FILES)]
    return [*sorted(files, key=lambda file: file.name == RunFile.RECORD), folder.path / RunFile.LOCK]


def size(place: Path) -> int:
    """Bytes of a file or of the files in a folder, without those behind links."""
    return sum(file.lstat().st_size for file in (place, *place.rglob("*")) if file.is_symlink() or file.is_file())


def remove(folder: RunDir, places: list[Path]) -> None:
    """Remove files and folders of a run, and its own folder once it is empty.

    Raises:
        UserError: the run has been started in the meantime.
    """
    with folder.held():
        for place in places:
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)
    if not any(folder.path.iterdir()):
        folder.path.rmdir()
