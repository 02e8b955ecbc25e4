"""Markdown tables on stdout."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_recipes.base.tables import text_of


def print_markdown(rows: Sequence[Mapping[str, Any]]) -> None:
    for cells in (rows[0], ["---"] * len(rows[0]), *(map(text_of, row.values()) for row in rows)):
        print(f"| {' | '.join(cells)} |")
