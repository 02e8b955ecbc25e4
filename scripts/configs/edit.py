"""One key of a config changed in its text, so that every comment stays.

A parser that carries comments along ties them to the value before, and loses them with it: a list replaced takes the
heading of the next section away. Here lines are edited where the parser says that the value stands.
"""

from contextlib import suppress
from typing import Any

import yaml

from ..base import yamlfiles
from ..base.errors import UserError
from . import config


def edited(text: str, key: str, value: Any, where: str) -> str:
    """A config's text with one dotted key set as `config.override` sets it, and marked with what it was.

    What is deleted, and lines that had comments, are left as comments.

    Raises:
        UserError: the key leads through something that has no keys, or the text has a form that cannot be edited.
    """
    before = yamlfiles.parse(text, where)
    after = config.override(before, key, value)
    if after == before:
        return text
    node, path = _root(text), key.split(".")
    entry, at = node, 0
    while at < len(path) and (found := yamlfiles.inside(node, path[at])):
        (entry, node), at = found, at + 1
    lines = text.split("\n")
    if at < len(path) and isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        for part in reversed(path[at + 1 :]):
            value = {part: value}
        indent = " " * node.value[0][0].start_mark.column
        lines.insert(
            _last_line(node, lines) + 1, f"{indent}{path[at]}: {yamlfiles.write_flow(value)}  # variant, was not set"
        )
    elif value is None and at == len(path) and isinstance(entry, yaml.ScalarNode) and entry.start_mark.column == 0:
        _remove(lines, entry, node)
    else:
        _replace(lines, entry, node, _at(before, path[:at]), _at(after, path[:at]))
    made = "\n".join(lines)
    with suppress(UserError):
        if yamlfiles.parse(made, where) == after:
            return made
    raise UserError(f"--set {key}: {where} has a form there that cannot be edited; change a copy of it by hand")


def _root(text: str) -> Any:
    return yaml.compose(text, Loader=yaml.CSafeLoader)


def _at(content: Any, path: list[str]) -> Any:
    for part in path:
        content = content[int(part)] if isinstance(content, list) else (content or {}).get(part)
    return content


def _is_block(node: Any) -> bool:
    """Whether a node has lines of its own."""
    if isinstance(node, yaml.ScalarNode):
        return node.style in ("|", ">") or node.start_mark.line != node.end_mark.line
    return not node.flow_style or node.start_mark.line != node.end_mark.line


def _last_line(node: Any, lines: list[str]) -> int:
    """The last line of a node; what the parser gives for a block reaches to the next token, over comments."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last, lines)
    line: int = node.end_mark.line - (
        node.end_mark.column == 0
    )  # a text that is a block ends where the next line begins
    while line > node.start_mark.line and not lines[line].strip():
        line -= 1
    return line


def _commented(line: str) -> str:
    return line if line.lstrip().startswith("#") or not line.strip() else f"# {line}"


def _remove(lines: list[str], entry: Any, node: Any) -> None:
    first, last = entry.start_mark.line, _last_line(node, lines)
    gone = [f"# variant, removed: {lines[first]}", *map(_commented, lines[first + 1 : last + 1])]
    lines[first : last + 1] = gone


def _replace(lines: list[str], entry: Any, node: Any, old: Any, new: Any) -> None:
    """Put another value in the place of a node, at a key or a position of a list."""
    first, last = node.start_mark.line, _last_line(node, lines)
    if _is_block(node) and isinstance(entry, yaml.ScalarNode):
        first = entry.start_mark.line
        head, rest = lines[first][: entry.end_mark.column] + ": ", lines[first]
        below = lines[first + 1 : last + 1]
    elif _is_block(node):
        head, rest, below = lines[first][: node.start_mark.column], "", lines[first : last + 1]
    else:
        head, rest, below = lines[first][: node.start_mark.column], lines[first][node.end_mark.column :], []
        head += "" if head.endswith((" ", "[", "{", ",")) else " "
    code, _, comment = rest.partition(" #")
    code = "" if _is_block(node) else code.rstrip()
    kept = f"; {comment.strip()}" if comment else ""
    marked = f"{head}{yamlfiles.write_flow(new)}{code}  # variant, was {yamlfiles.write_flow(old)}{kept}"
    says_more = any("#" in line for line in below)
    lines[first : last + 1] = [marked, *(map(_commented, below) if says_more else ())]
