"""Exceptions that end a command with a message instead of a traceback."""

import re
import shlex
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """Invalid request; the command prints the message and exits with code 2.

    Args:
        problem: what is wrong.
        file: the file with the mistake.
        line: the line in that file, from 1.
        key: the key, dotted, or the option with the mistake.
        remedy: what to do about it.

    Attributes:
        further: other mistakes, each printed on a line of its own.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        key: str = "",
        remedy: str = "",
    ):
        super().__init__(problem)
        self.problem = problem
        self.file = str(file) if file else ""
        self.line = line
        self.key = key
        self.remedy = remedy
        self.further: list[UserError] = []

    @property
    def place(self) -> str:
        """File and line; empty if the mistake is not in a file."""
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def explanation(self) -> str:
        """Problem and remedy."""
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem

    @property
    def description(self) -> str:
        """Key, problem and remedy."""
        return f"{self.key}: {self.explanation}" if self.key else self.explanation

    @property
    def summary(self) -> str:
        """Place and description, without further mistakes."""
        return f"{self.place}: {self.description}" if self.place else self.description

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(str, self.further)])


class WorkFailed(Exception):
    """Failed work; the command prints the message and exits with code 1."""


def require_plain(*names: object) -> None:
    """Raise UserError for a name or path with a control character, which could become a line of a script or file."""
    for name in map(str, names):
        if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name):
            raise UserError("a control character in this name", key=repr(name), remedy="rename it")


def one_line(error: Exception) -> str:
    """Message of another library's error on one line; the error's type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def with_type(error: Exception) -> str:
    """Message of another library's error behind the error's type."""
    return f"{type(error).__name__}: {error}"


def first_line(error: Exception) -> str:
    """First line of another library's error; the error's type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint with the nearest choices; empty if no choice is near."""
    names = {choice.lower(): choice for choice in choices}
    near = get_close_matches(word.lower(), names, n=3, cutoff=0.6)
    first = word.lower().partition("_")[0]
    same_first = [choice for choice in near if choice.partition("_")[0] == first]
    if same_first:  # lora_rank means lora_r rather than local_rank
        near = same_first
    return f"; did you mean {' or '.join(names[choice] for choice in near)}?" if near else ""


def meant(word: str, choices: Collection[str], what: str, hint: str = "", option: str = "") -> str:
    """Return the choice that a word names, by the full name or by a part.

    A part must begin at the start of a word in the name. If it is a complete component of several paths, the shortest
    path wins: `x` means `study/x` rather than `study/folder/x`.

    Args:
        what: the kind of choice, such as recipe, for messages.
        hint: the advice if no choice is near; by default a list of the choices.
        option: the option that has the word as its value, for messages.

    Raises:
        UserError: the word matches no choice or several.
    """
    if word in choices:
        return word
    matches = sorted(_matches(word.lower().strip("/"), choices))
    if len(matches) == 1:
        return matches[0]
    key = f"{option} {word}".strip() or "''"
    if matches:
        more = f" and {len(matches) - 8} more" if len(matches) > 8 else ""
        raise UserError(f"matches {', '.join(matches[:8])}{more}", key=key, remedy="give more of the name")
    components = [component for choice in choices for component in re.split("[/ ]", choice)]
    near = did_you_mean(word, choices) or did_you_mean(word, components)
    advice = near or hint or f"; there are {', '.join(choices)}"
    raise UserError(f"no {what} of that name{advice}", key=key)


def _matches(part: str, choices: Collection[str]) -> set[str]:
    """Choices with a part in lower case: as a complete component of a path, otherwise at the start of a word."""
    if not part:
        return set()
    levels = {choice: choice.count("/") for choice in choices if f"/{part}/" in f"/{choice.lower()}/"}
    if levels:
        return {choice for choice in levels if levels[choice] == min(levels.values())}
    start = re.compile(rf"(?<![^\W_]){re.escape(part)}")
    having = {choice for choice in choices if start.search(choice.lower())}
    return {choice for choice in having if choice.rpartition("/")[0] not in having}


def recipe_command(*words: object) -> str:
    """Command of this project as messages show it, with its words quoted for a shell."""
    return f"`recipe {shlex.join(map(str, words))}`"
