"""Secrets, which are never written down; and folders, machines, users and accounts, which no shared record has."""

import getpass
import os
import platform
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

Text = tuple[str, str]  # where it stands, and what it is

_TOKEN = (
    r"(?-i:(?<![A-Za-z0-9])(hf_(?=[a-z]*[\dA-Z])[A-Za-z0-9]{10,}|hf_[a-z]{16,}|gh[oprsu]_[A-Za-z0-9]{10,}"
    r"|github_pat_\w{10,}|[sp]k(-|_(live|test)_)(?=[\w-]*\d)[\w-]{16,}|glpat-[\w-]{10,}|npm_[A-Za-z0-9]{16,}|pypi-[\w-]{16,}"
    r"|xox[a-z]-[\w-]{10,}|wandb_v\d_\w{10,}|(AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]+))"
)
"""Access tokens, by how their issuers have them begin."""
_LABEL = "[a-z][a-z0-9-]*"
_REVEALING = {
    "a web address": r"\w://",
    "an address": r"[\w.+-]@[\w-]",
    "a path": r"(?<![\w.])(~[\w.-]*|\.{1,2})?/\S|\b[a-z]:[\\/]|\\\\\w|\w\\\w+\\|\S/\S*/",
    "an access token": _TOKEN,
    "a long random text, as keys and tokens are": r"\b(?=[a-z]*\d)(?=\d*[a-z])[a-z0-9]{24,}",
    "the name or address of a host": rf"(?<![\w.-])({_LABEL}\.)+[a-z]{{2,}}\b"
    r"|(?<![\d.])\d{1,3}(\.\d{1,3}){3}(?![\d.])",
}
"""What gives something away, by what it is."""
_PATTERNS = {what: re.compile(pattern, re.IGNORECASE) for what, pattern in _REVEALING.items()}
_EVERYBODYS = {"root", "user", "ubuntu", "debian", "localhost", "nvidia", "intel", "amd"}
"""Names of users and machines that say nothing about them, and that are words of much else."""

_NAMES_SECRET = re.compile(
    r"(api_?key|secret(_key)?|access_key|private_key|passw(or)?d|credentials?|authorization)$", re.IGNORECASE
)
_OF_TOKENIZERS = "bos eos pad unk sep cls mask eot eom boi eoi image audio video start end stop special assistant user"
_NAMES_TOKEN = re.compile(rf"(^|\.)(?!({_OF_TOKENIZERS.replace(' ', '|')})_token)[^.]*(?<!per_)token$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    rf"{_TOKEN}"
    r"|(?<=://)[^\s@/:]*:(?!\d+/)[^\s@]+(?=@)"
    r"|(?<![\w.-])(?P<key>[\w.-]*(api[_-]?key|secret|passw(or)?d|(?<!_)token|hub_token|auth_token)(=|[\"']\s?:\s?))"
    r"(?!true\b|false\b|null\b|None\b|\s)[^\s,;]+"
)
MASK = "[a secret]"


def is_secret(key: str, value: Any = None) -> bool:
    """Whether a dotted key is for something that must not be written to a file, or a value looks like it.

    Names of tokens that a tokenizer has are none: `special_tokens.pad_token`.
    """
    name = key.replace("-", "_")
    if _NAMES_SECRET.search(name):
        return True
    if _NAMES_TOKEN.search(name) and not name.startswith("special_tokens.") and not name.endswith("use_auth_token"):
        return True
    return any(masked(text) != text for _, text in texts(value))


def masked(text: str) -> str:
    """Replace secrets in a text: HF_TOKEN's value, and values given away by their shape or the name before them."""
    if len(token := os.environ.get("HF_TOKEN", "")) > 3:  # a placeholder such as 0 is in many texts
        text = text.replace(token, MASK)
    return _SECRET_VALUE.sub(lambda found: (found["key"] or "") + MASK, text)


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
