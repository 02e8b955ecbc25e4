"""One key of a config changed in its text, so that every comment stays.

A parser that carries comments along ties them to the value before, and loses them with it: a list replaced takes the
heading of the next section away. Here the lines of a top-level key are replaced where the parser says that they stand.
"""

from contextlib import suppress
from typing import Any

import yaml

from ..base import yamlfiles
from ..base.errors import UserError
from ..configs import config


def edited(text: str, key: str, value: Any, where: str, source: str | None = None) -> str:
    """Set one dotted key in a config's text, marked with its former value.

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
    top = key.partition(".")[0]
    document = yaml.compose(text, Loader=yaml.CSafeLoader)
    lines = text.split("\n")
    if not (entry := yamlfiles.inside(document, top)):
        remark = "; ".join(filter(None, ("variant, was not set", source)))
        lines.insert(_last_line(document, lines) + 1, f"{top}: {yamlfiles.write_flow(after.get(top))}  # {remark}")
    else:
        name, node = entry
        first = name.start_mark.line
        end = max(_last_line(node, lines), first) + 1  # an alias stands for a node before it
        old = lines[first:end]
        if top in after:
            is_line = end == first + 1 and not _is_block(node)
            comment = old[0][node.end_mark.column if is_line else name.end_mark.column :].partition(" #")[2].strip()
            was = "" if _is_same(before[top], after[top]) else f"variant, was {yamlfiles.write_flow(before[top])}"
            remarks = "; ".join(filter(None, (was, source or comment)))
            has_comments = not source and any("#" in line for line in old[1:])
            new = [f"{top}: {yamlfiles.write_flow(after[top])}  # {remarks}"]
            lines[first:end] = [*new, *map(_commented, old[1:] if has_comments else ())]
        elif source:
            lines[first:end] = [f"# variant, removed: {top}; {source}"]
        else:
            lines[first:end] = [f"# variant, removed: {old[0]}", *map(_commented, old[1:])]
    changed = "\n".join(lines)
    with suppress(UserError):
        if _is_same(yamlfiles.parse(changed, where), after):
            return changed
    raise UserError(f"--set {key}: {where} has a form there that cannot be edited; change a copy of it by hand")


def _is_same(a: Any, b: Any) -> bool:
    return a == b and not config.differences({"": a}, {"": b})  # Python alone takes true for 1


def _is_block(node: Any) -> bool:
    return node.style in ("|", ">") if isinstance(node, yaml.ScalarNode) else not node.flow_style


def _last_line(node: Any, lines: list[str]) -> int:
    """Last line of a node; the parser's end of a block lies behind comments."""
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
