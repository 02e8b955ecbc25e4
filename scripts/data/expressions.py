"""Expressions of a study.yaml: Jinja's, in a sandbox, from the fields of a raw row to a value of a prepared one."""

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import orjson
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment


def tagged(patch: str) -> str:
    """A patch on one line, with a tag before each of its lines, as the authors' code of the first study writes it.

    The hunk header and blank lines are dropped, the others stripped; `<add>` stands for +, `<del>` for -,
    `<keep>` for the rest.
    """
    tags = {"+": "<add>", "-": "<del>"}
    lines = (line for line in patch.splitlines() if line[1:].strip() and not line.startswith("@@"))
    return "".join(tags.get(line[0], "<keep>") + line[1:].strip() for line in lines)


def tojson(value: Any) -> str:
    """A value as JSON; Jinja's own filter of that name writes it for HTML."""
    return orjson.dumps(value).decode()


FILTERS: dict[str, Callable[..., Any]] = {"tagged": tagged, "tojson": tojson}
"""Filters that expressions have beside Jinja's own."""

_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
_JINJA.globals.clear()  # so that a name is a field's
_JINJA.filters |= FILTERS


class BadRow(Exception):
    """A raw row that no prepared one can be made of."""


class Expression:
    """A compiled expression.

    Args:
        name: its name in messages.
        text: the expression.

    Raises:
        ValueError: it is not an expression, or names an unknown filter or test.
    """

    def __init__(self, name: str, text: str):
        self._label = name if text == name else f"{name} ({text:.60})"
        try:
            self._compiled = _JINJA.compile_expression(text, undefined_to_none=False)
        except jinja2.TemplateError as error:
            raise ValueError(f"{text!r}: {error.message} (text stands in quotes of its own)") from None

    def value(self, fields: Mapping[str, Any]) -> Any:
        """The value for the fields of a row.

        Raises:
            BadRow: a field is missing, or the expression fails.
        """
        try:
            value = self._compiled(fields)
            if isinstance(value, jinja2.Undefined):
                str(value)  # raises the error that names the field
        except Exception as error:  # whatever an expression does with a value that it was not meant for
            raise BadRow(f"{self._label}: {error}") from None
        return value

    def text(self, value: Any) -> Any:
        """A value of this expression, if it is text, or a list or mapping.

        Raises:
            BadRow: it is not, or has null or a missing field in it.
        """
        if not isinstance(value, str) and (not isinstance(value, list | tuple | dict) or _has_gap(value)):
            raise BadRow(f"{self._label}: {value!r:.60}, not text, or a list or mapping of it; filter such rows out")
        return value


def _has_gap(value: Any) -> bool:
    """Whether a value, or one within it, is null or a missing field."""
    if isinstance(value, list | tuple | dict):
        return any(map(_has_gap, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, jinja2.Undefined)


def constants(fields: Mapping[str, str]) -> dict[str, Any]:
    """The values of those fields whose expressions name no field of a raw row."""
    parsed = {name: _JINJA.parse(f"{{{{ {text} }}}}") for name, text in fields.items()}
    same = [name for name, tree in parsed.items() if not meta.find_undeclared_variables(tree)]
    return {name: Expression(name, fields[name]).value({}) for name in same}


class RowMaker:
    """Makes prepared rows of raw ones.

    Args:
        fields: the expressions for the fields of a prepared row.
        filters: those for the rows to leave out, by reason; they see the prepared fields too.
        extra_fields: those for further fields, which may be null.
        order: the expression for the value that rows are sorted by; it sees the prepared fields too.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        filters: Mapping[str, str],
        extra_fields: Mapping[str, str],
        order: str | None,
    ):
        self._fields, self._filters, self._extra_fields, self._order = (
            {name: Expression(name, text) for name, text in texts.items()}
            for texts in (fields, filters, extra_fields, {"order": order} if order else {})
        )

    def make(self, raw: dict[str, Any]) -> tuple[dict[str, Any], str | None, dict[str, Any], Any]:
        """A prepared row, the reason to leave it out, its extra fields, and the value to sort it by.

        Raises:
            BadRow: a field is missing, or an expression fails or gives no text.
        """
        known = {"row": raw} | raw  # the whole row, for fields whose names are not identifiers
        row = _values(self._fields, known)
        both = known | row
        for reason, expression in self._filters.items():
            if expression.value(both):
                return row, reason, {}, None
        row = {name: self._fields[name].text(value) for name, value in row.items()}
        return row, None, _values(self._extra_fields, known), _values(self._order, both).get("order")


def _values(expressions: Mapping[str, Expression], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: expression.value(fields) for name, expression in expressions.items()}
