"""Processes: locks that they share, signals that ask them to stop, and children that end with their parent."""

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import naming, opened

LOOK = 0.2  # seconds; `is_held` holds a lock for less
LOCK_TIMEOUT = 600  # seconds to wait for a process that prepares what this one needs too


@contextmanager
def held(file: Path, otherwise: str, timeout: float = LOOK) -> Iterator[int]:
    """Hold a lock for this process and those that inherit the yielded descriptor, until the last of them ends.

    Args:
        file: the lock's file; its folder is made if need be.
        otherwise: the message if another process holds it.
        timeout: seconds to wait for that process.

    Raises:
        UserError: another process holds it.
    """
    deadline = time.monotonic() + timeout
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
            yield lock.fileno()
            return


def is_held(file: Path) -> bool:
    """True if a process holds a lock; False too if this one may not read the lock's file."""
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
        UserError: another process has been making it for `LOCK_TIMEOUT` seconds.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.part")
    lock = folder.with_name(f".{folder.name}.lock")
    with held(lock, f"another process has not finished {folder.name} in {LOCK_TIMEOUT} s", LOCK_TIMEOUT):
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        if not folder.is_dir():
            try:
                with naming(folder):
                    make(part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent has ended, in whatever way."""
    ctypes.CDLL(None).prctl(1, by)


def start_child(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process that ends with this one, in a session of its own: Ctrl-C reaches only this process.

    Signals wait until the child no longer has this process's handlers, which would swallow them. A scheduler's
    warning, SIGUSR1, concerns only this process. No Python below it imports modules from the working directory, as
    `python -m` and torchrun otherwise do.

    Args:
        command: the program and its arguments.
        options: of Popen, but preexec_fn.
    """
    options["env"] = {**options.get("env", os.environ), "PYTHONSAFEPATH": "1"}
    parent, stops = os.getpid(), (signal.SIGINT, signal.SIGTERM)

    def begin() -> None:
        for number in stops:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        end_with_parent()
        if os.getppid() != parent:  # it ended before that
            signal.raise_signal(signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)

    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=begin, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)


@contextmanager
def stop_requests(*more: signal.Signals) -> Iterator[list[int]]:
    """A list that grows by each signal to stop that arrives within the block; SIGUSR1 is a scheduler's warning.

    Args:
        more: further signals, as far as they are not ignored: nohup has SIGHUP be.
    """
    received: list[int] = []
    further = (number for number in more if signal.getsignal(number) != signal.SIG_IGN)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *further)
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
