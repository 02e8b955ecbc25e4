"""Processes of this machine, locks between them, and the time."""

import ctypes
import fcntl
import os
import platform
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from .errors import UserError
from .files import naming, opened

LOOK = 0.2  # seconds to wait for a lock; `is_held` holds a lock for less time
LOCK_TIMEOUT = 600  # seconds to wait for another process to prepare a shared folder
SECONDS, MEMORY = 5, 1 << 28  # that another author's pattern or template may take; the memory in bytes
_exceeding: set[str] = set()


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def now() -> str:
    """The time in UTC, in the format of run.json."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def held(file: Path, otherwise: str, timeout: float = LOOK) -> Iterator[int]:
    """Hold a lock within the block; yield its file descriptor.

    A process that inherits the descriptor holds the lock too, until it ends.

    Args:
        file: the lock file; its folder is created if necessary.
        otherwise: the message if another process holds the lock.
        timeout: seconds to wait for that process.

    Raises:
        UserError: another process holds the lock, or the file system does not support locks.
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
                    f"{file.parent}: the file system does not support locks (flock: {error.strerror}); "
                    "use a folder on another file system; --runs sets the folder for runs"
                ) from None
            with suppress(OSError):  # a full disk cannot record the holder
                os.ftruncate(lock.fileno(), 0)
                os.write(lock.fileno(), f"{platform.node()} {os.getpid()}".encode())
            yield lock.fileno()
            return


def is_held(file: Path) -> bool:
    """True if a process holds a lock; False if the lock file is not readable."""
    try:
        with opened(file, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def holder(file: Path) -> int | None:
    """Recorded process id of a lock's holder; None if no process of this user on this machine holds the lock.

    Another user could write any process id into the file, so the process must have the file open.
    """
    with suppress(OSError, ValueError, UserError):
        with opened(file, "rb") as lock:
            host, pid = lock.read(300).decode().split()
        if host == platform.node() and is_held(file):
            for descriptor in Path(f"/proc/{int(pid)}/fd").iterdir():
                with suppress(OSError):  # closed in the meantime, or no file
                    if descriptor.samefile(file):
                        return int(pid)
    return None


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Create a folder once, even if several processes need it.

    Args:
        folder: the folder; it appears only when complete.
        make: function that creates and fills a temporary folder.

    Raises:
        UserError: another process has been busy with the folder for `LOCK_TIMEOUT` seconds.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.part")
    lock = folder.with_name(f".{folder.name}.lock")
    with held(lock, f"another process has not finished {folder.name} in {LOCK_TIMEOUT} s", LOCK_TIMEOUT):
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process
        if not folder.is_dir():
            try:
                with naming(folder):
                    make(part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Make Linux send this process a signal when the parent process ends."""
    ctypes.CDLL(None).prctl(1, by)


def start_child(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a child process that ends when this process ends.

    The child gets a new session, so that Ctrl-C reaches only this process. SIGINT and SIGTERM are blocked until the
    child has reset the inherited handlers, because these handlers would swallow the signals. The child ignores SIGUSR1;
    schedulers send it to warn this process. The child and its own children do not import Python modules from the
    working directory. By default, `python -m` and torchrun would import them.

    Args:
        command: the program and its arguments.
        options: options of Popen, except preexec_fn.
    """
    options["env"] = {**options.get("env", os.environ), "PYTHONSAFEPATH": "1"}
    parent, stops = os.getpid(), (signal.SIGINT, signal.SIGTERM)

    def begin() -> None:
        for number in stops:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        end_with_parent()
        if os.getppid() != parent:  # the parent ended before the call above
            signal.raise_signal(signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)

    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=begin, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)


@contextmanager
def bounded(text: str) -> Iterator[None]:
    """Interrupt the use of a pattern or template by another author that takes too much time or memory.

    Python's own loops and its `re` notice signals; outside the main thread, which alone gets them, only loops are
    interrupted. Of the memory, only writable pages of this process count.

    Args:
        text: the pattern or template, or its file; later calls refuse it at once.

    Raises:
        UserError: it takes more than `SECONDS` or `MEMORY`.
    """
    exceeded = UserError(f"takes more than {SECONDS} s or {MEMORY >> 20} MiB", key=text[:60])
    if text in _exceeding:
        raise exceeded
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    stop = _interrupted_later()
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + MEMORY, limits[1]))
        yield
    except MemoryError:
        _exceeding.add(text)
        raise exceeded from None
    finally:
        stop()
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _interrupted_later() -> Callable[[], object]:
    """Raise a MemoryError in this thread after SECONDS, unless the returned function is called before."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, _time_out)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return partial(signal.setitimer, signal.ITIMER_REAL, 0)
    thread, interrupt = ctypes.c_ulong(threading.get_ident()), ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(SECONDS, partial(interrupt, thread, ctypes.py_object(MemoryError)))

    def stop() -> None:
        timer.cancel()
        timer.join()
        interrupt(thread, None)  # takes back an error that has not been raised yet

    timer.start()
    return stop


def _time_out(*_: object) -> None:
    raise MemoryError  # a TimeoutError is an OSError, which glob ignores


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list that collects SIGINT, SIGTERM, and the warning of a scheduler, SIGUSR1."""
    received = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
