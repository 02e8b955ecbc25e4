"""The report of `make upgrade`: what two snapshots of Axolotl differ in, as Markdown."""

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.terminal import tables

Items = dict[str, dict[str, Any]]
_LONGEST = 200  # characters of a cell
_MOST_NAMED = 6


@dataclass
class Part:
    """One part of the comparison."""

    title: str
    before: Items | str
    """What was measured; a text says why it could not be."""
    after: Items | str

    @property
    def failed(self) -> bool:
        """Whether it was not measured, before or after, or an item of it was not."""
        return bool(list(self.failures()))

    def failures(self) -> Iterator[str]:
        """What could not be measured, and why."""
        for when, side in (("before", self.before), ("after", self.after)):
            if isinstance(side, str):
                yield f"{when}: {side}"
            else:
                yield from (f"{when}, {item}: {side[item]['failed']}" for item in side if "failed" in side[item])

    def differences(self) -> list[dict[str, Any]]:
        """Rows of what differs: fields with the same change stand together, with the items that have it."""
        if isinstance(self.before, str) or isinstance(self.after, str):
            return []
        rows = []
        where: dict[tuple[str, str, str], list[str]] = {}
        for item in sorted(self.before.keys() | self.after.keys()):
            old, new = self.before.get(item), self.after.get(item)
            if "failed" in (old or {}) or "failed" in (new or {}):
                continue
            if old is None or new is None:
                rows.append({"what": item, "before": _whole(old), "after": _whole(new), "where": ""})
                continue
            for field in sorted(old.keys() | new.keys(), key=_natural):
                if old.get(field) == new.get(field):
                    continue
                before, after = _pair(old.get(field), new.get(field))
                if field == "version":  # which packages share by chance
                    rows.append({"what": item, "before": before, "after": after, "where": ""})
                else:
                    where.setdefault((field, before, after), []).append(item)
        every = len(self.after)
        for (field, before, after), items in where.items():
            of = f"all {every}" if len(items) == every > 1 else _named(items)
            rows.append({"what": field, "before": before, "after": after, "where": of})
        return rows


def _natural(text: str) -> list[tuple[int, str]]:
    """What sorts step 2 before step 10."""
    return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", text)]


def _named(items: list[str]) -> str:
    more = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _whole(fields: dict[str, Any] | None) -> str:
    """An item that only one side has, in a cell; a version alone is only that."""
    if fields is None:
        return "–"
    texts = [str(value) if key in ("type", "version") else f"{key}: {_text(value)}" for key, value in fields.items()]
    return _cut("; ".join(texts))


def _pair(old: Any, new: Any) -> tuple[str, str]:
    """Two values in their cells; of numbers also how far the second is off."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new)):
        return _text(old), _text(new) + (f" ({100 * (new / old - 1):+.3g} %)" if old else "")
    return _cut(_text(old)), _cut(_text(new))


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def locked(file: Path) -> Items:
    """The packages of a lock with their versions."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), re.MULTILINE)
    return {name: {"version": version} for name, version in found}


def markdown(title: str, parts: list[Part], outcome: str) -> str:
    """The whole report.

    Args:
        outcome: what was done to the working tree.
    """
    lines = [f"# {title}", "", outcome, ""]
    for part in parts:
        rows = part.differences()
        lines += [f"## {part.title}", ""]
        for failure in part.failures():
            lines += [f"- not measured {failure}"]
        lines += [""] * part.failed
        if rows:
            with redirect_stdout(io.StringIO()) as table:
                tables.print_markdown(rows)
            lines += [f"{len(rows)} difference{'s' * (len(rows) > 1)}", "", table.getvalue()]
        elif not isinstance(part.before, str) and not isinstance(part.after, str):
            values = sum(map(len, part.before.values()))
            lines += [f"unchanged: {len(part.before)} items, {values} values", ""]
    return "\n".join(lines).rstrip() + "\n"
