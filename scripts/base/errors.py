"""The exceptions that end a command with a message instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The request was wrong: the command prints the message and ends with exit code 2.

    The message says what is wrong, where, and what to do about it.
    """


class WorkFailed(Exception):
    """The request was right, but the work failed: the command prints the message and ends with exit code 1."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A half-sentence that names the nearest choices, or nothing if none is near."""
    near = get_close_matches(word, list(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
