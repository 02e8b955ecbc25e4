"""Locks on files and folders, for processes that share them."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .disks import naming
from .errors import UserError
from .files import opened

LOOK = 0.2  # seconds; `is_held` holds a lock for less
PATIENCE = 600  # seconds to wait for a process that prepares what this one needs too


@contextmanager
def held(file: Path, otherwise: str, patience: float = LOOK, remove: bool = False) -> Iterator[int]:
    """Hold a lock for this process and those that inherit the yielded descriptor, until the last of them ends.

    Args:
        file: the lock's file; its folder is made if need be.
        otherwise: the message if another process holds it.
        patience: seconds to wait for that process.
        remove: whether to remove the file at the end.

    Raises:
        UserError: another process holds it.
    """
    deadline = time.monotonic() + patience
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        with opened(file, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{file.parent}: {otherwise}") from None
                time.sleep(0.1)
                continue
            except OSError as error:
                raise UserError(
                    f"{file.parent}: its file system does not lock files (flock: {error.strerror}); "
                    "choose a folder on another, for runs with --runs"
                ) from None
            if not _is_at(lock.fileno(), file):
                continue  # the process that held it has removed it
            try:
                yield lock.fileno()
            finally:
                if remove:
                    file.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is still the one at a path; its link count would not show that on NFS."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def is_held(file: Path) -> bool:
    """Whether a process holds a lock; False too if this one may not read the lock's file."""
    try:
        with opened(file, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that is made the first time it is needed, and by one process if several need it at once.

    Args:
        folder: the folder; it appears only when it is complete.
        make: writes the content into the folder that it is given.

    Raises:
        UserError: another process has been making it for `PATIENCE` seconds.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.part")
    lock = folder.with_name(f".{folder.name}.lock")
    with held(lock, f"another process has not finished {folder.name} in {PATIENCE} s", PATIENCE, remove=True):
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        if not folder.is_dir():
            try:
                with naming(folder):
                    make(part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder
