"""Signals that ask a process to stop, and processes that end with their parent."""

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent has ended, in whatever way."""
    ctypes.CDLL(None).prctl(1, by)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that grows by each signal to stop that arrives within the block; SIGUSR1 is a scheduler's warning."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
