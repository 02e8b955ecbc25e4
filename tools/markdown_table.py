"""Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_recipes.base.tables import text_of


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *(map(text_of, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_markdown(rows: Sequence[Mapping[str, Any]]) -> None:
    print(markdown(rows))
