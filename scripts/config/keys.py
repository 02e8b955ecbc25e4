"""Table of Axolotl's keys: what they affect, and which values need the user's consent.

A config may come from somebody else.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..base import yamlfiles
from ..base.yamlfiles import Config

EVALUATED = ("model", "rows", "order", "evaluated")
"""Effects on the tokens behind an eval loss per token, or on the loss of a token."""
NOT_PREPARED = ("batches", "training", "memory", "speed", "output", "upload", "tracking", "run", "unused")
"""Effects other than on the rows that Axolotl prepares."""
NOT_TRAINED = ("tracking", "run")
"""Effects of keys that name only the folders and trackers of a run."""


@dataclass(frozen=True)
class Key:
    """A line of keys.yaml, which explains the attributes."""

    affects: str = "rows"
    kind: str = "number"
    does: str = ""
    level: Literal["error", "note"] = "error"
    allowed: str = ""
    starts: str = ""
    local: str | None = None
    one_model: bool = False
    untraced: str = ""
    like: str = ""

    def allows(self, value: Any) -> bool:
        """True if a value needs no consent."""
        return re.fullmatch(self.allowed, str(value)) is not None

    def is_harmless(self, value: Any) -> bool:
        """True if a value cannot name or allow code."""
        return self.kind != "code" or self.allows(value)


WITHOUT_LINE = Key(kind="code")
"""The line that counts for a key without one."""


@cache
def table() -> dict[str, Key]:
    """Content of keys.yaml."""
    lines = yamlfiles.read_yaml(Path(__file__).with_name("keys.yaml"))
    return {key: _parsed(key, line) for key, line in lines.items()}


def _parsed(key: str, line: Any) -> Key:
    """A line, which can be a single word."""
    if isinstance(line, dict):
        return Key(**line)
    return Key(kind=line) if "." in key else Key(line)


def find(key: str) -> Key:
    """The line of a dotted key, in which positions in lists do not matter."""
    name = re.sub(r"\.\d+(?=\.|$)", "", key)
    first, dot, rest = name.partition(".")
    like = f"{table().get(first, WITHOUT_LINE).like or first}{dot}{rest}"
    for candidate in (name, like, f"*.{name.rpartition('.')[2]}"):
        if candidate in table():
            return table()[candidate]
    patterns = [pattern for pattern in table() if "*" in pattern and fnmatchcase(like, pattern)]
    return table().get(max(patterns, key=len, default=""), WITHOUT_LINE)


def affects(key: str) -> str:
    """The first in the table's order of what a dotted key can change."""
    return table().get(key.partition(".")[0], WITHOUT_LINE).affects


def affecting(word: str) -> list[str]:
    """Top-level keys that affect something."""
    return [key for key, line in table().items() if line.affects == word and "." not in key]


@dataclass(frozen=True)
class UnreadKey:
    """A key that Axolotl's schema does not list.

    Attributes:
        reason: the reason why Axolotl does not read it, with its name here if another tool reads it.
        is_refused: Axolotl refuses the key; it ignores others.
        is_known: an old release or another tool reads the key, so that it is no misspelling.
    """

    reason: str
    is_refused: bool
    is_known: bool


def unread(name: str) -> UnreadKey:
    """Look up a key, by its last part, in unread_keys.yaml."""
    tables = _unread_tables()
    name = name.removeprefix("fsdp_")  # keys of fsdp_config may have it
    reason = "no release of Axolotl reads it"
    release, new = tables["last"].get(name), tables["instead"].get(name)
    if release:
        reason = f"Axolotl {release} is the last release that reads it"
    elif new:
        reason = f"{reason}; it is {new} here"
    return UnreadKey(reason, name in tables["refused"], bool(release or new))


@cache
def _unread_tables() -> Config:
    return yamlfiles.read_yaml(Path(__file__).with_name("unread_keys.yaml"))


def of_one_model() -> list[str]:
    """Keys that suit only one base model."""
    return [key for key, line in table().items() if line.one_model]


def remote_trackers(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Trackers that send data to a server, by name, each with the keys of the config that turn it on."""
    for key, line in table().items():
        if line.local is None:
            continue
        name = key.partition("_")[0]
        switches = [switch for switch, other in table().items() if other.starts == name and config.get(switch)]
        value = config.get(key, os.environ.get(key.upper(), ""))
        if switches and not re.fullmatch(line.local, str(value)):
            yield name, switches
