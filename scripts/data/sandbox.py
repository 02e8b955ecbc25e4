"""Jinja's sandbox for expressions of study.yaml, with a bound on what they compute."""

from typing import Any

import jinja2
from jinja2 import filters
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST = 1_000_000
"""Largest number of characters, items or bits that an operator or a filter can create."""
MOST_TEXT = 2000  # characters of an expression
_FILTERS = (
    "abs capitalize count d default dictsort first float groupby int items last length list lower max min reject "
    "rejectattr reverse select selectattr sort string title trim unique upper wordcount"
)
"""Jinja's filters whose results are at most as large as their input."""
_METHODS = (
    "capitalize count endswith find get index items keys lower lstrip partition removeprefix removesuffix rfind "
    "rpartition rsplit rstrip split splitlines startswith strip title upper values"
)
"""Methods of texts, lists and mappings whose results are at most as large as their input."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Environment for expressions over a raw row; names are fields only."""

    intercepted_binops = frozenset(("*", "**", "%"))  # Jinja does not compute these when it compiles

    def __init__(self, **more: Any):
        super().__init__(undefined=jinja2.StrictUndefined)
        self.globals.clear()
        self.filters = {name: filters.FILTERS[name] for name in _FILTERS.split()}
        self.filters |= {"join": _join, "map": _map, "replace": _replace} | more

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `*`, `**` or `%` if the result is small."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% formats text, which is not allowed; join texts with ~")
        if operator == "**" and isinstance(left, int):
            _limit(left.bit_length() * right)
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | list | tuple):
                _limit(size(value) * times)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method of `_METHODS`."""
        name = getattr(__obj, "__name__", "this call")
        if name not in _METHODS.split() or not isinstance(__obj.__self__, str | list | tuple | dict):
            raise SecurityError(f"{name} is not allowed; allowed are {_METHODS}, and filters such as join and replace")
        return super().call(__context, __obj, *args, **kwargs)


def size(value: Any) -> int:
    """Number of characters and items in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return 1 + sum(map(size, value)) if isinstance(value, list | tuple) else 1


def _limit(number: float) -> None:
    if number > MOST:
        raise SecurityError(f"the expression would create a value larger than {MOST:,}")


def _join(values: Any, separator: str = "") -> str:
    """Texts of a list, joined by a separator."""
    texts = [*map(str, values)]
    _limit(len(texts) * len(separator))
    return separator.join(texts)


def _map(values: Any, attribute: str) -> list[Any]:
    """One field of each mapping in a list; Jinja's filter of this name can also enlarge each value."""
    return [value[attribute] for value in values]


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    """Text with a part replaced."""
    text = str(text)
    _limit(text.count(old) * (len(new) - len(old)))
    return text.replace(old, new, count)
