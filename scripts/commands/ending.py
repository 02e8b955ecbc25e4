"""How the command ends: its exit code, and a line instead of a traceback for what a user or the machine can cause."""

import errno
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..base import paths
from ..base.errors import UserError, WorkFailed
from ..base.files import DISK_FULL, RESERVED_BYTES, free_bytes
from ..base.progress import say


def ended(command: Callable[[], object]) -> int:
    """Carry a command out.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 the request was wrong.
    """
    try:
        code = _code(command)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refused(str(error), 2)
    except WorkFailed as error:
        return _refused(str(error), 1)
    except (ImportError, MemoryError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        return _refused(f"memory did not suffice, or its limit is too low{f': {error}' if str(error) else ''}", 1)
    except OSError as error:
        if error.errno is None:  # transformers' words for what the hub lacks, or for a hub that was given up
            return _refused(str(error.__context__ if isinstance(error.__context__, WorkFailed) else error), 1)
        if error.filename is None and error.errno not in (*DISK_FULL, errno.EIO):
            raise  # not of a file that the user named
        where = error.filename or _unnamed()
        return _refused(f"{where}: {_in_words(error)}", 1 if error.errno in (*DISK_FULL, errno.EIO) else 2)


def _unnamed() -> str:
    """Where there was no room by an error that does not say so: standard output if it still takes nothing, or else the
    cache or the folder for temporary files, where libraries write, if one is full; what else is written is named."""
    libraries = paths.cache(), Path(tempfile.gettempdir())
    full = next((folder for folder in libraries if free_bytes(folder) < RESERVED_BYTES), None)
    if full:
        with suppress(OSError):
            print(flush=True)  # a line, as there may be nothing left to flush
            return str(full)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
    return "standard output"


def _code(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):  # why it ended, as Python has it
            raise WorkFailed(end.code) from None
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _in_words(error: OSError) -> str:
    return "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)


def _refused(problem: str, code: int) -> int:
    say(f"recipe: {problem}")
    return code
