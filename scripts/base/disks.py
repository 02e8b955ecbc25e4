"""Room on the disks that files are written to."""

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last by a limit on the size of files
RESERVE = 1 << 16  # bytes, enough for a run's record

_SAID = r"No space left on device|Disk quota exceeded|os error 28|PytorchStreamWriter failed writing"
_NO_ROOM = re.compile(rf"(?:{_SAID})(?:[^\n']*: '(/[^'\n]+)')?")  # as Python, safetensors' Rust and torch say it


def free(path: Path) -> int:
    """The bytes that this user can still write where a path lies, or would lie; without end where its file system, as
    /proc, has no size."""
    usage = shutil.disk_usage(nearest(path))
    return usage.free if usage.total else sys.maxsize


def nearest(path: Path) -> Path:
    """A path, or the nearest of the folders above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error of the disk within the block name what was being written, which the error of a full one does not.

    Raises:
        OSError: with the path, also where a library raised an error of its own kind for a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL, errno.EIO):
            error.filename = error.filename or str(path)
        raise
    except Exception as error:
        if _NO_ROOM.search(str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep some room free in a folder for what has to be written there after the block, however full it gets.

    Raises:
        OSError: of the folder, which has not even that room.
    """
    with ExitStack() as stack:
        with naming(folder):
            # without a name, so that nobody who is killed leaves it
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            content = os.urandom(RESERVE)  # zeros would take no room on some disks
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())  # a disk elsewhere says only then that it is full
        yield


def where_full(log: str, folders: list[Path]) -> Path | None:
    """Where a process ran out of room: the file that its log names, else the fullest of some folders; None where it
    did not. The log itself may have had no room for saying so.

    Args:
        log: the last lines of what it said: earlier ones can tell of what it could do without.
        folders: those that it writes to, where `reserved` still holds room, or not.
    """
    said = _NO_ROOM.search(log)
    if said and said[1]:
        return Path(said[1])
    fullest = min(folders, key=free)
    return fullest if said or free(fullest) < RESERVE else None
