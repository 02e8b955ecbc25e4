"""Secrets: recognition by key and by value, and masking of everything that leaves the program."""

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

MASK = "***"

_OF_TOKENIZERS = "bos eos pad unk sep cls mask eot eom boi eoi image audio video start end stop special assistant user"
_NAME = (
    rf"(?i:(?!(?:{_OF_TOKENIZERS.replace(' ', '|')})_token\b)[\w-]*(?:api[_-]?key|access[_-]?key([_-]?id)?"
    r"|account[_-]?key|private[_-]?key|secret([_-]?key)?|passw(or)?d|passphrase|credentials?|authorization"
    r"|connection[_-]?string|webhook([_-]url)?|(?<!per_)(?<!use_auth_)token)|(?:x-[\w-]*)?signature|sig)"
)
"""Names of keys, variables and parameters that hold a secret. Tokens of tokenizers, such as `pad_token`, are not."""
_KEY = re.compile(rf"(^|\.){_NAME}(\.|$)")
_VARIABLE = re.compile(_NAME)
_TOKEN = (
    r"(?<![A-Za-z0-9])(?:hf_(?=[a-z]*[\dA-Z])[A-Za-z0-9]{10,}|hf_[a-z]{16,}|gh[oprsu]_[A-Za-z0-9]{10,}"
    r"|github_pat_\w{10,}|[sp]k(?:-|_(?:live|test)_)(?=[\w-]{,200}\d)[\w-]{16,}|glpat-[\w-]{10,}|npm_[A-Za-z0-9]{16,}"
    r"|pypi-[\w-]{16,}|xox[a-z]-[\w-]{10,}|wandb_v\d_\w{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}"
    r"|ya29\.[\w-]{16,}|nvapi-[\w-]{16,}|gsk_[A-Za-z0-9]{16,}|dapi[0-9a-f]{32}|eyJ[\w-]{10,1000}\.[\w.-]+)"
)
"""Access tokens, by their issuers' prefixes."""
# $VARIABLE and $(command) read a secret; dots and {placeholders} stand for one, unless more follows
_NO_VALUE = (
    r"(?![\"']?(?:`|\$[({A-Z_])|\*\*\*|true\b|false\b|null\b|None\b|\s|[\"']?(?:\.{3,}+|\{\w+\})(?![^\s\"'`,;)}\]>]))"
)
_SECRET = re.compile(
    rf"{_TOKEN}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END|\Z)"
    r"|(?P<scheme>\bBearer\s+)(?=[A-Za-z]*[\d._~+/=-]+\w|[A-Za-z]{16})[\w.~+/=-]{8,}"
    rf"|(?P<key>(?<![\w-]){_NAME}(?:=(?!=)|\\?[\"']\s?:\s?)|(?<=[{{\"']){_NAME}:\s){_NO_VALUE}"
    r"(?:(?i:bearer|basic|token)\s+)?(?:\\?\"[^\"\n]*\"|'[^'\n]*'|[^\s,;]+)"
)
_COMMENT = re.compile(rf"(?m)(?P<key>#[ \t#-]{{,80}}+(?:[\w-]+\.)*+{_NAME}[ \t]*:[ \t]+)[^\s#]\S*[ \t]*$")
_URL = re.compile(r"(?i:https?)?://[^\s\"'<>`]*[^\s\"'<>`.,:;!?)\]}]")
_PASSWORD = re.compile(r"(?<=://)[^@/:]*:(?!\d+/)[^@]+(?=@)")
_USER_OF_WEB = re.compile(r"(?i)(?<=tps://|ttp://)[^@/?#]+(?=@)")
_PARAMETER = re.compile(r"([?&;#])(?=[^&;#?])([^=&;#?]*)(=?)([^&;#?]*)")
_SHOWN = {"download", "revision", "split", "ref", "path", "export", "format", "raw", "dl", "version"}
"""Parameters of a URL that are shown; any other can sign a request."""
_SHOWN_VALUE = re.compile(r"(?:[\w.,:@/+~-]|%2[0Ff])*")  # not an encoded URL with parameters of its own


def names_secret(key: str) -> bool:
    """True if a dotted key, or a key above it, names a secret."""
    return bool(_KEY.search(key)) and not re.search(r"(^|\.)special_tokens\.", key)


def is_secret(key: str, value: Any = None) -> bool:
    """True if a dotted key names a secret, or the value contains one."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return names_secret(key) or _without_tokens(text) != text


def masked(text: str) -> str:
    """Mask secrets in a text, and parameters of URLs except those of `_SHOWN`."""
    return _without_tokens(_URL.sub(_shown_url, text))


def masked_comments(text: str) -> str:
    """Mask `key: value` of secrets in the comments of a YAML text; other text is unchanged."""
    return _COMMENT.sub(lambda match: match["key"] + MASK, text)


def without_secrets(value: Any, key: str = "") -> Any:
    """Copy of a value for people and files, with secrets masked by key and by value.

    Args:
        value: text, number, or nested lists and mappings.
        key: dotted key of the value.
    """
    if value is None or isinstance(value, bool):
        return value
    if names_secret(key):
        return MASK
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        above = f"{key}." if key else ""
        return {masked(str(name)): without_secrets(item, f"{above}{name}") for name, item in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [without_secrets(item, key) for item in value]
    return value


def _without_tokens(text: str) -> str:
    for secret in _of_environment():
        text = text.replace(secret, MASK)
    text = _URL.sub(_without_password, text)
    return _SECRET.sub(lambda match: (match["scheme"] or match["key"] or "") + MASK, text)


def _of_environment() -> list[str]:
    """Values of variables such as HF_TOKEN; a placeholder such as 0 occurs in many texts."""
    values = [os.environ[name] for name in os.environ if _is_secret_variable(name)]
    return [value for value in values if len(value) > 7]


@cache
def _is_secret_variable(name: str) -> bool:
    return bool(_VARIABLE.fullmatch(name))


def _without_password(match: re.Match[str]) -> str:
    """URL without user and password; other schemes than http can have a name before @."""
    before, at, behind = match[0].rpartition("@")
    return _USER_OF_WEB.sub(MASK, _PASSWORD.sub(MASK, before + at)) + behind


def _shown_url(match: re.Match[str]) -> str:
    """URL without the values of parameters that are not in `_SHOWN`."""
    place, *parameters = re.split("(?=[?#])", match[0], maxsplit=1)
    is_web = not place.startswith("://")
    return place + "".join(_PARAMETER.sub(lambda part: _shown_parameter(part, is_web), text) for text in parameters)


def _shown_parameter(match: re.Match[str], is_web: bool) -> str:
    """Parameter of a URL; its value is masked unless `_SHOWN` has its name. Without a name, it is a value."""
    separator, name, equals, value = match.groups()
    if name in _SHOWN and _SHOWN_VALUE.fullmatch(value):
        return match[0]
    if not equals and (separator == "#" or not is_web):  # a place in a page, or a pattern of files
        return match[0]
    if re.fullmatch(r"[A-Za-z][\w.-]{0,40}", name) and value.strip("="):  # else a value that ends with =
        return f"{separator}{name}={MASK}"
    return separator + MASK
