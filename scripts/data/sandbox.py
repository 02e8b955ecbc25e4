"""Jinja's sandbox for expressions of study.yaml, with a bound on what they compute."""

from typing import Any

import jinja2
from jinja2 import filters
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST = 1_000_000
"""Largest number of characters and items that a product, a filter or a call can create."""
_MOST_BITS = 1024  # of a number
MOST_TEXT = 2000  # characters of an expression
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("sort", "string", "title", "trim", "unique", "upper", "wordcount"),
)
"""Jinja's filters whose results are at most as large as their input."""
_METHODS = frozenset(
    (
        *("capitalize", "count", "endswith", "find", "get", "index", "items", "join", "keys", "lower", "lstrip"),
        *("partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit", "rstrip", "split"),
        *("splitlines", "startswith", "strip", "title", "upper", "values"),
    )
)
"""Methods of texts, lists and mappings that expressions can call."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Environment for expressions over a raw row; names are fields only."""

    intercepted_binops = frozenset(("*", "**", "%"))  # Jinja does not compute these when it compiles

    def __init__(self, **more: Any):
        super().__init__(undefined=jinja2.StrictUndefined)
        self.globals.clear()
        self.filters = {name: filters.FILTERS[name] for name in _FILTERS} | {"join": _join, "replace": _replace} | more

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `*`, `**` or `%` if the result is small."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% formats text, which is not allowed; join texts with ~")
        if operator == "**" and isinstance(right, int | float):
            _limit(_bits(left) * abs(right), _MOST_BITS)
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            _limit(_bits(left) + _bits(right), _MOST_BITS)
        elif operator == "*" and isinstance(left, int):
            _limit(left * size(right))
        elif operator == "*" and isinstance(right, int):
            _limit(size(left) * right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method of `_METHODS`."""
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if name not in _METHODS or not isinstance(owner, str | list | tuple | dict):
            raise SecurityError(f"{name or 'this call'} is not allowed; allowed are {', '.join(sorted(_METHODS))}")
        if name == "join":
            return _join(args[0], str(owner))
        if name == "replace":
            return _replace(owner, *args)
        return super().call(__context, __obj, *args, **kwargs)


def size(value: Any) -> int:
    """Number of characters and items in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(size(key) + size(below) for key, below in value.items()) + 1
    return sum(map(size, value)) + 1 if isinstance(value, list | tuple) else 1


def _limit(number: float, most: int = MOST) -> None:
    if number > most:
        raise SecurityError(f"the expression would create a value larger than {most:,}")


def _bits(number: Any) -> int:
    return number.bit_length() if isinstance(number, int) else 1


def _join(values: Any, separator: str = "") -> str:
    """Texts of a list, joined by a separator."""
    texts = [str(value) for value in values]
    _limit(len(texts) * len(separator))
    return separator.join(texts)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    """Text with a part replaced."""
    text = str(text)
    if len(new) > len(old):
        _limit(text.count(old) * len(new))
    return text.replace(old, new, count)
