"""Requests to stop that a process gets, and processes that end with others."""

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent is gone, however the parent ended."""
    ctypes.CDLL(None).prctl(1, by)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals to stop that arrive within the block, in a list that grows; SIGUSR1 is a scheduler's warning."""
    received: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        handlers[number] = signal.signal(number, lambda n, _: received.append(n))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
