"""A line of what `recipe doctor` found, in words that can be shared."""

import os
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from ..base import paths
from ..base.private import masked, problem

State = Literal["ok", "note", "wrong"]
PROJECT = "qlora-recipes"
_BEFORE, _AFTER = "(?<![a-zA-Z0-9])", "(?![a-zA-Z0-9])"  # of a name as a whole word


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
        package: its name; empty for all of them, for which there is no command without a lock.
        anew: whether it has that version, and is broken all the same.
    """
    if paths.LOCK.is_file():
        # make sees by the lock's time that it is to look at the packages again
        return in_checkout(f"rm -r .venv && make setup{_kept()}" if anew else "touch requirements.lock && make setup")
    if not package:
        return ""
    if anew and (installed := _installed(package)):
        if package == "torch":
            return torch_for("")  # the registry has not all of its builds
        return f"pip install --force-reinstall '{package}=={installed}'"
    requirements = (text.partition(";")[0].strip() for text in requires(PROJECT) or ())
    wanted = next((text for text in requirements if re.match(rf"{package}\b(?!-)", text)), package)
    return f"pip install '{wanted}'"


def _kept() -> str:
    """What has `make setup` take the CUDA that .venv remembers once that is gone."""
    file = paths.LOCK.parent / ".venv" / ".cuda"
    chosen = file.read_text().strip() if file.is_file() else ""
    return f" CUDA={chosen}" if chosen else ""


def _installed(package: str) -> str:
    """A package's version, without the name of its build; empty where it is not installed."""
    try:
        return (version(package) or "").partition("+")[0]
    except PackageNotFoundError:
        return ""


def torch_for(cuda: str) -> str:
    """The command that installs torch's build for a CUDA.

    Args:
        cuda: such as 12.6; empty for that of the lock, or without one what the driver runs.
    """
    if paths.LOCK.is_file():
        # uv takes any build of the lock's version for the lock's
        return in_checkout(f"make setup CUDA={cuda}" if cuda else "rm -r .venv && make setup")
    backend = f"cu{cuda.replace('.', '')}" if cuda else "auto"
    return f"uv pip install --reinstall-package torch --torch-backend {backend} torch=={_installed('torch')}"


def in_checkout(command: str) -> str:
    """A command for the project's folder, wherever the user is."""
    there = paths.LOCK.parent
    return command if Path.cwd() == there else f"cd {in_shell(there)} && {command}"


def in_shell(path: Path) -> str:
    """A path as a shell takes it, with its variables in the place of the home folder and the user."""
    home, user = Path.home(), os.environ.get("USER")
    start, rest = "", str(path)
    if home != Path("/") and path.is_relative_to(home):
        start, rest = '"$HOME"/', str(path.relative_to(home))
    pieces = re.split(f"{_BEFORE}{re.escape(user)}{_AFTER}", rest) if user else [rest]
    return start + '"$USER"'.join(piece and shlex.quote(piece) for piece in pieces)


def first_line(error: BaseException) -> str:
    """An error's class and what it says first."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def shareable(text: str, names: set[str]) -> str:
    """A text without secrets and without names, of which `~` stands for the home folder.

    Args:
        text: the text.
        names: those of this machine and its user; of a machine's also the part before the first dot. Names of one or
            two letters, and words that are everybody's, as root, are kept.
    """
    text = masked(text)
    if (home := str(Path.home())) != "/":
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    for name in sorted(names | {name.partition(".")[0] for name in names}, key=len, reverse=True):
        if problem(name, {name}):
            text = re.sub(f"{_BEFORE}{re.escape(name)}{_AFTER}", "…", text, flags=re.IGNORECASE)
    return text
