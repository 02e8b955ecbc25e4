"""The exceptions that end a command with a message instead of a traceback."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The request was wrong: the command prints the message and ends with exit code 2.

    The message says what is wrong, where, and what to do about it.
    """


class WorkFailed(Exception):
    """The work failed: the command prints the message and ends with exit code 1."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A half-sentence that names the nearest choices, or nothing if none is near."""
    lower = {choice.lower(): choice for choice in choices}
    near = [lower[choice] for choice in get_close_matches(word.lower(), lower, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def meant(word: str, choices: Collection[str], what: str, hint: str = "", option: str = "") -> str:
    """Choice of a given name, or of a part that no other choice has.

    A part begins where a word of the name begins. If it is a whole piece of paths, those of the fewest levels are
    meant: `x` is `study/x` rather than `study/folder/x`.

    Args:
        what: what the choices are, for messages: a recipe.
        hint: what to do where no choice is near; by default the choices are listed.
        option: the option that the word was given to, for messages.

    Raises:
        UserError: none of them is meant, or several may be.
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
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise UserError(f"{given}: may be any of {', '.join(sorted(found)[:8])}{more}; give more of its name")
    pieces = (piece for choice in choices for piece in re.split("[/ ]", choice))
    near = did_you_mean(word, choices) or did_you_mean(word, pieces)
    raise UserError(f"{given}: no {what} of that name{near or hint or f'; there are {", ".join(choices)}'}")
