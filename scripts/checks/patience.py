"""A bound on the time that a pattern of a config's author takes to match: some take longer than anybody's life."""

import re
import signal
import threading
from collections.abc import Iterable
from typing import Any

SECONDS = 1.0


class TooLong(Exception):
    """A pattern was not done in time; its message says which."""


def matching(pattern: str, texts: Iterable[str]) -> list[str]:
    """Those of some texts that a regular expression matches as a whole.

    Raises:
        TooLong: it was not done with all of them in `SECONDS`; outside the main thread there is no such bound.
        re.error: it is not a regular expression.
    """
    if threading.current_thread() is not threading.main_thread():
        return _matching(pattern, texts)

    def stop(*_: Any) -> None:
        raise TooLong(f"{pattern} takes longer than {SECONDS:g} s to match the names of layers, perhaps for ever")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return _matching(pattern, texts)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _matching(pattern: str, texts: Iterable[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except (OverflowError, RecursionError) as error:
        raise re.error(str(error)) from None
    return [text for text in texts if compiled.fullmatch(text)]
