"""Files that a process writes, programs that it starts, and hosts that it asks for, by Python's audit events.

Native code raises no events, so a test also compares the files that must stay.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {  # positions of paths in an event's arguments, each with that of its folder's descriptor
    "os.chmod": ((0, 2),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, 0),),
}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
HOSTS = {"socket.connect": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.sendto": 1}

Event = tuple[str, str]
"""Name of an audit event, and the path, program or host."""

_receivers: list[Callable[[Event], object]] = []


def _path(name: Any, folder: Any) -> Path:
    """Absolute path, without links in its folder."""
    path = Path(os.fsdecode(name))
    if isinstance(folder, int) and folder >= 0:
        path = Path(f"/proc/self/fd/{folder}").readlink() / path
    return path.parent.resolve() / path.name


def _seen(event: str, words: tuple[Any, ...]) -> list[str]:
    """Paths, programs or hosts of an audit event, if it is one of those above."""
    if event == "open":
        is_path = isinstance(words[0], str | bytes | os.PathLike)
        return [str(_path(words[0], None).resolve())] if is_path and words[2] & WRITING else []
    if event in STARTS:
        return [os.fsdecode(words[0])]
    if event in HOSTS:
        return [str(words[HOSTS[event]])]
    places = CHANGES.get(event, ())
    return [str(_path(words[path], words[folder])) for path, folder in places if not isinstance(words[path], int)]


def _hook(event: str, words: tuple[Any, ...]) -> None:
    if _receivers:
        for seen in _seen(event, words):
            for receive in _receivers:
                receive((event, seen))


@contextmanager
def watching() -> Iterator[list[Event]]:
    """A list that fills with the events of this process within the block."""
    _install()
    events: list[Event] = []
    _receivers.append(events.append)
    try:
        yield events
    finally:
        _receivers.remove(events.append)


@cache
def _install() -> None:
    """Add the hook, once, because none can be removed."""
    sys.addaudithook(_hook)


def log_to(file: str) -> None:
    """Append the events of this process to a file, one line each, until it ends."""
    stream = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _receivers.append(lambda event: os.write(stream, f"{event[0]}\t{event[1]}\n".encode()))
    _install()


def elsewhere(events: list[Event], *folders: Path) -> list[Event]:
    """Writes outside some folders, with all hosts; Python's byte-code and devices do not count."""
    inside = (*(f"{folder.resolve()}/" for folder in folders), "/dev/", "/proc/")
    return [
        (event, seen)
        for event, seen in events
        if event not in STARTS and not f"{seen}/".startswith(inside) and "/__pycache__/" not in f"{seen}/"
    ]


def hosts_of(url: str) -> set[str]:
    """Texts of the events of a connection to a URL on this machine."""
    url_parts = urlsplit(url)
    return {str((url_parts.hostname, url_parts.port)), str(url_parts.hostname)}
