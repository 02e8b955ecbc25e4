"""Signals that ask a process to stop, and processes that end with their parent."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
