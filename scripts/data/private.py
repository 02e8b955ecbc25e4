"""What must not stand in a record that is handed in: folders, machines, users, accounts and secrets."""

import getpass
import platform
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

Text = tuple[str, str]  # where it stands, and what it is

_LABEL = "[a-z][a-z0-9-]*"
_REVEALING = {
    "a web address": r"\w://",
    "an address": r"[\w.+-]@[\w-]",
    "a path": r"(?<![\w.])(~[\w.-]*|\.{1,2})?/\S|\b[a-z]:[\\/]|\\\\\w|\w\\\w+\\|\S/\S*/",
    "an access token": r"\b(hf|gh[a-z]|sk|pk|npm|glpat|pypi|xox[a-z]|github_pat|wandb_v\d)[-_](?=[\w-]*\d)[\w-]{12,}"
    r"|\b(AKIA|ASIA|AIza|eyJ)[\w-]{12,}",
    "a long random text, as keys and tokens are": r"\b(?=[a-z]*\d)(?=\d*[a-z])[a-z0-9]{24,}",
    "the name or address of a host": rf"(?<![\w.-])({_LABEL}\.)+[a-z]{{2,}}\b"
    r"|(?<![\d.])\d{1,3}(\.\d{1,3}){3}(?![\d.])",
}
"""What gives something away, by what it is."""
_PATTERNS = {what: re.compile(pattern, re.IGNORECASE) for what, pattern in _REVEALING.items()}
_EVERYBODYS = {"root", "user", "ubuntu", "debian", "localhost", "nvidia", "intel", "amd"}
"""Names of users and machines that say nothing about them, and that are words of much else."""


def names_here() -> set[str]:
    """The names of this machine and of its user."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user can be without a name
        user = ""
    return {platform.node(), user, Path.home().name} - {""}


def problem(text: str, names: Collection[str] = ()) -> str | None:
    """What a text gives away, in words; None where that is nothing.

    Args:
        text: the text.
        names: those of machines and users, which it must not have as whole words.
    """
    for what, pattern in _PATTERNS.items():
        if pattern.search(text):
            return what
    parts = {part for name in names for part in (name, name.partition(".")[0])}
    for name in (name for name in parts if len(name) > 2 and name.lower() not in _EVERYBODYS):
        if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", text, re.IGNORECASE):
            return "the name of a machine or of its user"
    return None


def texts(value: Any, place: str = "") -> Iterator[Text]:
    """Every text in a value of JSON, keys among them, with its place as a dotted path."""
    if isinstance(value, str):
        yield place, value
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str):
            yield (
                f"{place}, a key".removeprefix(", "),
                key.replace(".", " "),
            )  # dots join keys there, not names of hosts
        yield from texts(below, f"{place}.{key}".removeprefix("."))
