"""Exceptions that end a command with a message instead of a traceback."""

import re
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
        others: further mistakes, each printed on a line of its own.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        key: str = "",
        remedy: str = "",
        others: Iterable["UserError"] = (),
    ):
        super().__init__(problem)
        self.problem = problem
        self.file = str(file) if file else ""
        self.line = line
        self.key = key
        self.remedy = remedy
        self.others = list(others)

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
        """Place and description, without the other mistakes."""
        return f"{self.place}: {self.description}" if self.place else self.description

    def __str__(self) -> str:
        return "\n".join([self.summary, *map(str, self.others)])


class WorkFailed(Exception):
    """Failed work; the command prints the message and exits with code 1."""


def require_plain(*names: object) -> None:
    """Raise UserError for a name or path with a control character, which could become a line of a script or file."""
    for name in map(str, names):
        if not name.isprintable() and re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name):
            raise UserError("a control character in this name", key=repr(name), remedy="rename it")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint with the nearest choices; empty if no choice is near."""
    lower = {choice.lower(): choice for choice in choices}
    near = get_close_matches(word.lower(), lower, n=3, cutoff=0.6)
    # lora_rank means lora_r rather than local_rank
    near = [choice for choice in near if choice.partition("_")[0] == word.lower().partition("_")[0]] or near
    return f"; did you mean {' or '.join(lower[choice] for choice in near)}?" if near else ""


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
    part = word.lower().strip("/")
    whole = [choice for choice in choices if part and f"/{part}/" in f"/{choice.lower()}/"]
    levels = min((choice.count("/") for choice in whole), default=0)
    found = {choice for choice in whole if choice.count("/") == levels}
    if part and not found:
        having = {choice for choice in choices if re.search(rf"(?<![^\W_]){re.escape(part)}", choice.lower())}
        found = {choice for choice in having if choice.rpartition("/")[0] not in having}
    if len(found) == 1:
        return found.pop()
    given = f"{option} {word or "''"}".strip()
    if found:
        others = f" and {len(found) - 8} more" if len(found) > 8 else ""
        matches = f"matches {', '.join(sorted(found)[:8])}{others}"
        raise UserError(matches, key=given, remedy="give more of the name")
    pieces = (piece for choice in choices for piece in re.split("[/ ]", choice))
    near = did_you_mean(word, choices) or did_you_mean(word, pieces)
    advice = near or hint or f"; there are {', '.join(choices)}"
    raise UserError(f"no {what} of that name{advice}", key=given)
