"""Expressions of a study.yaml: how a prepared row is made of a raw one. Jinja's, in the sandbox that templates use."""

from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from ..base import paths
from ..base.errors import did_you_mean
from ..base.templating import environment
from .declaration import Misdeclared
from .filters import FILTERS

_OWN = "qlora_recipes_"  # begins the names of values that are no fields of the raw row
_RESULT = f"{_OWN}result"
_WHOLE = "row"  # names the whole raw row, for fields whose names are not words


def _environment() -> SandboxedEnvironment:
    made = environment(paths.TEMPLATES)
    made.filters |= FILTERS
    return made


_JINJA = _environment()


def parsed(text: str) -> nodes.Expr:
    """An expression's syntax tree.

    Raises:
        ValueError: it is none, or names a filter or a test that there is not.
    """
    try:
        parser = Parser(_JINJA, text, state="variable")
        expression = parser.parse_expression()
        if not parser.stream.eos:
            raise jinja2.TemplateSyntaxError(f"unexpected {parser.stream.current.value!r} behind it", 1)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{text!r} is not an expression: {error.message}; text stands in quotes of its own") from None
    for node in _within(expression, nodes.Filter, nodes.Test):
        what, known = ("filter", _JINJA.filters) if isinstance(node, nodes.Filter) else ("test", _JINJA.tests)
        if node.name not in known:
            hint = did_you_mean(node.name, known) or f"; there are Jinja's, and the filters {', '.join(FILTERS)}"
            raise ValueError(f"{text!r}: no {what} {node.name!r}{hint}")
    expression.set_environment(_JINJA)
    return expression


def _within(expression: nodes.Expr, *kinds: type[nodes.Node]) -> list[Any]:
    """The nodes of some kinds that an expression is made of, itself among them."""
    return [node for node in (expression, *expression.find_all(kinds)) if isinstance(node, kinds)]


def constants(row: Mapping[str, str]) -> dict[str, Any]:
    """Those of some fields whose expression is the same for every row, with their values."""
    trees = {name: parsed(text) for name, text in row.items()}
    return {name: tree.value for name, tree in trees.items() if isinstance(tree, nodes.Const)}


def _template(steps: Mapping[str, nodes.Expr]) -> jinja2.Template:
    """A template that sets one variable after the other."""
    body: list[nodes.Node] = [nodes.Assign(nodes.Name(name, "store"), step, lineno=1) for name, step in steps.items()]
    tree = nodes.Template(body, lineno=1)
    tree.set_environment(_JINJA)
    return _JINJA.from_string(tree)


def _result(template: jinja2.Template, known: dict[str, Any]) -> Any:
    """What a template leaves in `_RESULT`."""
    context = template.new_context(known, shared=True)  # without Jinja's functions, so that a name is a field's
    for _ in template.root_render_func(context):
        pass
    return context.vars[_RESULT]


class BadRow(Exception):
    """A raw row that no prepared one can be made of; the message says why, and which fields the row has."""


class RowMaker:
    """Makes prepared rows of raw ones. All expressions are compiled once, into one template.

    Args:
        row: the expressions for the fields of a prepared row.
        drop: by reason those for the rows to leave out, which see the prepared fields too.
        carry: those for further fields, which may be null.
        order: one whose value rows are sorted by.

    Raises:
        Misdeclared: one is not an expression.
    """

    def __init__(
        self,
        row: Mapping[str, str],
        drop: Mapping[str, str],
        carry: Mapping[str, str] | None = None,
        order: str | None = None,
    ):
        self._fields = tuple(row)
        self._carried = tuple(carry or ())
        parts = {"row": dict(row), "drop": dict(drop), "carry": dict(carry or {})}
        parts["order"] = {} if order is None else {"longest_first": order}
        self._texts = {(part, key): text for part, texts in parts.items() for key, text in texts.items()}
        self._trees = {at: self._tree(*at) for at in self._texts}
        names = {name.name for tree in self._trees.values() for name in _within(tree, nodes.Name)}
        self._wants_whole = _WHOLE in names
        self._template = self._compiled()

    def _tree(self, part: str, key: str) -> nodes.Expr:
        """An expression; if it sees prepared fields, those take the place of raw ones of the same names."""
        try:
            tree = parsed(self._texts[part, key])
        except ValueError as error:
            raise Misdeclared(str(error), part, key) from None
        if part in ("drop", "order"):
            for name in _within(tree, nodes.Name):
                if name.name in self._fields:
                    name.name = f"{_OWN}{self._fields.index(name.name)}"
        return tree

    def _compiled(self) -> jinja2.Template:
        """A template that leaves (values, reason to drop, (carried values, order) of rows that are kept)."""

        def those(part: str) -> nodes.Tuple:
            return nodes.Tuple([tree for at, tree in self._trees.items() if at[0] == part], "load")

        values = [f"{_OWN}{number}" for number in range(len(self._fields))]
        reason: nodes.Expr = nodes.Const(None)
        for (part, key), tree in reversed(self._trees.items()):
            if part == "drop":
                reason = nodes.CondExpr(tree, nodes.Const(key), reason)
        dropped = nodes.Name(f"{_OWN}reason", "load")
        rest = nodes.CondExpr(dropped, nodes.Const(None), nodes.Tuple([those("carry"), those("order")], "load"))
        fields = nodes.Tuple([nodes.Name(name, "load") for name in values], "load")
        steps = dict(zip(values, those("row").items, strict=True))
        steps |= {f"{_OWN}reason": reason, _RESULT: nodes.Tuple([fields, dropped, rest], "load")}
        return _template(steps)

    def make(self, raw: dict[str, Any]) -> tuple[dict[str, Any], str | None, dict[str, Any], Any]:
        """A prepared row, the reason to leave it out, what it carries, and its value to be sorted by.

        Raises:
            BadRow: a field is missing, or an expression gives no text.
        """
        known = {_WHOLE: raw} | raw if self._wants_whole else raw
        try:
            values, reason, rest = _result(self._template, known)
        except Exception as error:  # whatever an expression does with a value that it was not meant for
            raise self._explained(known, error) from None
        for value in values:
            if type(value) is not str:
                values = self._checked(values, raw)
                break
        row = dict(zip(self._fields, values, strict=True))
        if rest is None:
            return row, reason, {}, None
        carried, order = rest
        if self._carried:
            self._no_missing(carried, raw)
        return row, reason, dict(zip(self._carried, carried, strict=True)), order[0] if order else None

    def _checked(self, values: tuple[Any, ...], raw: dict[str, Any]) -> list[Any]:
        """The values of a row's fields, text or lists and mappings, in which nothing is missing."""
        checked = []
        for name, value in zip(self._fields, values, strict=True):
            is_text = isinstance(value, str)
            if not is_text and not isinstance(value, list | tuple | dict):
                raise self._no_text(name, value, "is", raw)
            for leaf in () if is_text else _leaves(value):
                if leaf is None or isinstance(leaf, jinja2.Undefined):
                    raise self._no_text(name, leaf, "has in it", raw)
            checked.append(str(value) if is_text else value)  # Jinja has a class of its own for some
        return checked

    def _no_text(self, name: str, value: Any, has: str, raw: dict[str, Any]) -> BadRow:
        """What is wrong with a value that should be text."""
        if isinstance(value, jinja2.Undefined):
            return self._missing("row", name, value, raw)
        if value is None:
            what = "null, not text; leave such rows out with drop, or name another field"
        else:
            kinds = {bool: "a yes or no", int: "a number", float: "a number"}
            what = f"{kinds.get(type(value), 'a function')}, not text; a filter makes it text"
        return BadRow(f"{self._named('row', name)} {has} {what}{_there(raw)}")

    def _no_missing(self, carried: tuple[Any, ...], raw: dict[str, Any]) -> None:
        for name, value in zip(self._carried, carried, strict=True):
            if isinstance(value, jinja2.Undefined):
                raise self._missing("carry", name, value, raw)

    def _explained(self, known: dict[str, Any], error: Exception) -> BadRow:
        """Which expression fails for a row, and why."""
        values = dict(known)
        for (part, name), tree in self._trees.items():
            try:
                value = _result(_template({_RESULT: tree}), values)
                if part == "drop":
                    bool(value)
            except jinja2.UndefinedError as undefined:
                return self._missing(part, name, undefined, known)
            except Exception as failure:
                problem = f"{self._named(part, name)} fails: {failure}"
                return BadRow(f"{problem}; drop such rows, or write it otherwise{_there(known)}")
            if isinstance(value, jinja2.Undefined):
                return self._missing(part, name, value, known)
            if part == "row":
                values[f"{_OWN}{self._fields.index(name)}"] = value
        return BadRow(f"{error}{_there(known)}")

    def _missing(self, part: str, name: str, of: Any, raw: Mapping[str, Any]) -> BadRow:
        """What an expression is that names a field which a row has not; `of` is that value, or the error about it."""
        try:
            said = str(of)
        except jinja2.UndefinedError as undefined:
            said = str(undefined)
        problem = f"the row has no {said.removesuffix(' is undefined')}" if said.endswith(" is undefined") else said
        return BadRow(f"{self._named(part, name)}: {problem}{_there(raw)}")

    def _named(self, part: str, name: str) -> str:
        """An expression in messages."""
        text = self._texts[part, name]
        what = {"row": name, "carry": name, "drop": f"drop {name}", "order": "the order"}[part]
        return what if text == name else f"{what} ({text if len(text) < 60 else text[:57] + '…'})"


def _leaves(value: Any) -> Iterator[Any]:
    """The values in lists and mappings, however deep."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _there(raw: Mapping[str, Any]) -> str:
    names = [name for name in raw if name != _WHOLE]
    return f"; the row has {', '.join(names)}" if names else "; the row is empty"
