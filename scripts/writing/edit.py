"""Change one key in a config's text, and keep the comments of all other keys.

YAML parsers that keep comments attach each comment to the value before it. Replacing a list would therefore also delete
a comment that introduces the next key. This module replaces only the lines of a top-level key.
"""

from contextlib import suppress
from typing import Any

import yaml

from ..base import yamlfiles
from ..base.errors import UserError
from ..configs import config


def edited(text: str, key: str, value: Any, where: str, source: str | None = None) -> str:
    """Set or delete a dotted key in a config's text, and note the change in a comment.

    The new value is written on one line, whose comment gives the former value. Without `source`, the lines of a deleted
    key are kept, commented out. So are the lines of a former value after its first line, if they contain a comment.

    Args:
        text: the text.
        key: the key.
        value: the new value; None deletes the key.
        where: the name of the text in messages.
        source: source of a top-level key's new value, or the reason for deleting the key. If given, the comment
            states it. Nothing is then kept of the key's former lines and comments.

    Raises:
        UserError: `config.override` cannot set the key, or the key's lines cannot be edited.
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
        end = max(_last_line(node, lines), first) + 1  # an alias has the lines of its anchor, which come earlier
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
    raise UserError(f"--set {key}: cannot edit the lines of this key in {where}; edit a copy by hand")


def _is_same(a: Any, b: Any) -> bool:
    return a == b and not config.differences({"": a}, {"": b})  # in Python, True equals 1


def _is_block(node: Any) -> bool:
    return node.style in ("|", ">") if isinstance(node, yaml.ScalarNode) else not node.flow_style


def _last_line(node: Any, lines: list[str]) -> int:
    """Index of a node's last line.

    Trailing comments, which come before the parser's end mark, are left out.
    """
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _last_line(last[1] if isinstance(last, tuple) else last, lines)
    line: int = node.end_mark.line
    if node.end_mark.column == 0:  # a block scalar ends at the start of the next line
        line -= 1
    while line > node.start_mark.line and not lines[line].strip():
        line -= 1
    return line


def _commented(line: str) -> str:
    return line if line.lstrip().startswith("#") or not line.strip() else f"# {line}"
