"""Subsets of the rows of a file: random draws, and rows at listed positions."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..base.files import read_json, sha256
from .declaration import Subset

PlacedRow = tuple[int, bytes, Any]  # the row's position in the raw file, its line, and the value that it is sorted by


def draw(rows: Iterable[PlacedRow], size: int, seed: int) -> list[PlacedRow]:
    """`size` rows drawn at random, each with the same chance, in their order; all if there are no more."""
    chance = random.Random(seed)
    drawn: list[PlacedRow] = []
    for count, row in enumerate(rows, start=1):
        if len(drawn) < size:
            drawn.append(row)
        elif (place := chance.randrange(count)) < size:
            drawn[place] = row
    return sorted(drawn, key=lambda row: row[0])


def method(subset: Subset, folder: Path) -> dict[str, Any]:
    """How the rows of a subset are chosen, as the manifest records it; `folder` is the study's."""
    if subset.positions is None:
        return {"rows": subset.rows, "seed": subset.seed or 0}
    file = folder / subset.positions
    return {"positions": file.name, "sha256_of_positions": sha256(file)}


def choose(subset: Subset, folder: Path, rows: list[PlacedRow]) -> list[PlacedRow]:
    """The rows of a subset: drawn, or at the positions that a file in the study's folder lists, in that order."""
    if subset.positions is None:
        return draw(rows, subset.rows, subset.seed or 0)
    by_position = {row[0]: row for row in rows}
    positions = read_json(folder / subset.positions)["rows"]
    return [by_position[position] for position in positions if position in by_position]


def obstacle(subset: Subset, rows: int, is_study_file: bool) -> str | None:
    """Why a subset cannot be chosen from so many rows, or None."""
    if subset.positions is None:
        return f"only {rows} rows to draw from" if rows < subset.rows else None
    return None if is_study_file else "its positions are of the study's test file, which this is not"
