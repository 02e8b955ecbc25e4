"""A line of what `recipe doctor` found, in words that can be shared."""

import re
import shlex
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Literal

from ..base import paths
from ..data.private import masked, problem

State = Literal["ok", "note", "wrong"]
PROJECT = "qlora-recipes"


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        state: ok; note, something to know that keeps nothing from working here; or wrong.
        found: what was found.
        remedy: what to do about it.
        command: what to paste into a shell for that; empty where it takes no command or an unknown one.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    command: str = ""


def repair(package: str, anew: bool = False) -> str:
    """The command that brings a package back to the version that the lock has, or the project requires.

    Args:
        package: its name.
        anew: whether it has that version, and is broken all the same.
    """
    if not paths.LOCK.is_file():
        requirements = (text.partition(";")[0].strip() for text in requires(PROJECT) or ())
        wanted = next((text for text in requirements if re.match(rf"{package}\b(?!-)", text)), package)
        return f"pip install {'--force-reinstall ' if anew else ''}'{wanted}'"
    # make sees by the lock's time that it is to look at the packages again
    return in_checkout("rm -r .venv && make setup" if anew else "touch requirements.lock && make setup")


def in_checkout(command: str) -> str:
    """A command for the project's folder, wherever the user is."""
    there = paths.LOCK.parent
    return command if Path.cwd() == there else f"cd {shlex.quote(str(there))} && {command}"


def first_line(error: BaseException) -> str:
    """An error's class and what it says first."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def shareable(text: str, names: set[str]) -> str:
    """A text without secrets and without names, of which `~` stands for the home folder.

    Args:
        text: the text.
        names: those of this machine and its user; words that are everybody's, as root, are kept.
    """
    text = masked(text)
    if (home := str(Path.home())) != "/":
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    for name in names:
        if problem(name, {name}):
            text = re.sub(rf"(?<![a-zA-Z0-9]){re.escape(name)}(?![a-zA-Z0-9])", "…", text)
    return text
