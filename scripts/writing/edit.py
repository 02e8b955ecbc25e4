"""One key of a config changed in its text, so that every comment stays.

A parser that carries comments along ties them to the value before, and loses them with it: a list replaced takes the
heading of the next section away. Here lines are edited where the parser says that the value stands.
"""

from contextlib import suppress
from typing import Any

import yaml

from ..base import yamlfiles
from ..base.errors import UserError
from ..configs import config


def edited(text: str, key: str, value: Any, where: str, source: str | None = None) -> str:
    """A config's text with one dotted key set as `config.override` sets it, and marked with what it was.

    What is deleted, and lines that had comments, are left as comments.

    Args:
        text: the text.
        key: the key.
        value: its value; None deletes it.
        where: the text's name in messages.
        source: of a top-level key, the source of the value, or why it is deleted, where the comments that are there
            would not be true any more; it takes their place.

    Raises:
        UserError: the key leads through something that has no keys, or the text has a form that cannot be edited.
    """
    before = yamlfiles.parse(text, where)
    after = config.override(before, key, value)
    if _is_same(before, after) and (source is None or key not in before):
        return text
    path = key.split(".")
    entry: Any = yaml.compose(text, Loader=yaml.CSafeLoader)
    node = entry
    depth = 0  # parts of the path that are there
    while depth < len(path) and (below := yamlfiles.inside(node, path[depth])):
        entry, node = below
        depth += 1
    lines = text.split("\n")
    if depth < len(path) and isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        for part in reversed(path[depth + 1 :]):
            value = {part: value}
        indent = " " * node.value[0][0].start_mark.column
        remark = "; ".join(filter(None, ("variant, was not set", source)))
        added = f"{indent}{path[depth]}: {yamlfiles.write_flow(value)}  # {remark}"
        lines.insert(_last_line(node, lines) + 1, added)
    elif value is None and depth == len(path) and isinstance(entry, yaml.ScalarNode) and entry.start_mark.column == 0:
        _remove(lines, entry, node, source)
    else:
        _replace(lines, entry, node, _at(before, path[:depth]), _at(after, path[:depth]), source)
    changed = "\n".join(lines)
    with suppress(UserError):
        if _is_same(yamlfiles.parse(changed, where), after):
            return changed
    raise UserError(f"--set {key}: {where} has a form there that cannot be edited; change a copy of it by hand")


def _is_same(a: Any, b: Any) -> bool:
    return a == b and not config.differences(a, b)  # Python alone takes true for 1


def _at(content: Any, path: list[str]) -> Any:
    for part in path:
        content = content[int(part)] if isinstance(content, list) else content.get(part)
    return content


def _is_block(node: Any) -> bool:
    """Whether a node has lines of its own."""
    several_lines = node.start_mark.line != node.end_mark.line
    in_block_style = node.style in ("|", ">") if isinstance(node, yaml.ScalarNode) else not node.flow_style
    return in_block_style or several_lines


def _last_line(node: Any, lines: list[str]) -> int:
    """The last line of a node; what the parser gives for a block reaches to the next token, over comments."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last, lines)
    line: int = node.end_mark.line
    if node.end_mark.column == 0:  # a text that is a block ends where the next line begins
        line -= 1
    while line > node.start_mark.line and not lines[line].strip():
        line -= 1
    return line


def _commented(line: str) -> str:
    return line if line.lstrip().startswith("#") or not line.strip() else f"# {line}"


def _remove(lines: list[str], entry: Any, node: Any, source: str | None) -> None:
    first = entry.start_mark.line
    end = _last_line(node, lines) + 1
    if source:
        lines[first:end] = [f"# variant, removed: {entry.value}; {source}"]
    else:
        lines[first:end] = [f"# variant, removed: {lines[first]}", *map(_commented, lines[first + 1 : end])]


def _replace(lines: list[str], entry: Any, node: Any, old: Any, new: Any, source: str | None) -> None:
    """Put another value in the place of a node, at a key or a position of a list."""
    first = node.start_mark.line
    end = _last_line(node, lines) + 1
    head = lines[first][: node.start_mark.column]
    code, comment = "", ""
    below: list[str] = []
    if not _is_block(node):
        head += "" if head.endswith((" ", "[", "{", ",")) else " "
        code, _, comment = lines[first][node.end_mark.column :].partition(" #")
    elif isinstance(entry, yaml.ScalarNode):
        first = entry.start_mark.line
        head = f"{lines[first][: entry.end_mark.column]}: "
        comment = lines[first].partition(" #")[2]
        below = lines[first + 1 : end]
    else:
        below = lines[first:end]
    was = "" if _is_same(old, new) else f"variant, was {yamlfiles.write_flow(old)}"
    remarks = "; ".join(filter(None, (was, source or comment.strip())))
    has_comments = not source and any("#" in line for line in below)
    marked = f"{head}{yamlfiles.write_flow(new)}{code.rstrip()}  # {remarks}"
    lines[first:end] = [marked, *(map(_commented, below) if has_comments else ())]
