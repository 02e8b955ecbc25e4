"""Secrets, which are masked where text leaves the program."""

import os
import re
from collections.abc import Iterator
from typing import Any

_TOKEN = (
    r"(?-i:(?<![A-Za-z0-9])(hf_(?=[a-z]*[\dA-Z])[A-Za-z0-9]{10,}|hf_[a-z]{16,}|gh[oprsu]_[A-Za-z0-9]{10,}"
    r"|github_pat_\w{10,}|[sp]k(-|_(live|test)_)(?=[\w-]*\d)[\w-]{16,}|glpat-[\w-]{10,}|npm_[A-Za-z0-9]{16,}|pypi-[\w-]{16,}"
    r"|xox[a-z]-[\w-]{10,}|wandb_v\d_\w{10,}|(AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]+))"
)
"""Access tokens, by how their issuers have them begin."""
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
    return any(masked(text) != text for text in _texts(value))


def masked(text: str) -> str:
    """Replace secrets in a text: HF_TOKEN's value, and values given away by their shape or the name before them."""
    if len(token := os.environ.get("HF_TOKEN", "")) > 3:  # a placeholder such as 0 is in many texts
        text = text.replace(token, MASK)
    return _SECRET_VALUE.sub(lambda found: (found["key"] or "") + MASK, text)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(item)
