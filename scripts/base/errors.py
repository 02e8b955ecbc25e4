"""The one exception that ends a command because of what the user asked for."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The request was wrong: the command prints the message and ends with exit code 2.

    The message says what is wrong, where, and what to do about it.
    """


class WorkFailed(Exception):
    """The work that was asked for could not be done: message on stderr, exit code 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A half-sentence that names the nearest known words, or nothing where none is near."""
    near = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
