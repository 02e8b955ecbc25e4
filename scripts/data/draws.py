"""Subsets of the rows of a file: random draws, and rows at listed positions."""

import random
from collections.abc import Sequence
from pathlib import Path

from ..base.files import read_json, sha256
from .study import Study


class Draw:
    """`size` rows drawn at random, each with the same chance, in their order; all if there are no more."""

    def __init__(self, size: int, seed: int):
        self.about = {"rows": size, "seed": seed}
        self._size = size
        self._random = random.Random(seed)
        self._offered = 0
        self._drawn: list[tuple[int, bytes]] = []

    def offer(self, idx: int, row: bytes) -> None:
        self._offered += 1
        if len(self._drawn) < self._size:
            self._drawn.append((idx, row))
        elif (place := self._random.randrange(self._offered)) < self._size:
            self._drawn[place] = idx, row

    def missing(self, of_study_file: bool) -> str | None:
        return f"only {self._offered} rows to draw from" if self._offered < self._size else None

    def rows(self) -> list[bytes]:
        return [row for _, row in sorted(self._drawn)]


class Listed:
    """The rows at the positions that a file lists, in the order of that list; positions in the study's own file."""

    def __init__(self, file: Path):
        self.about = {"positions": file.name, "sha256_of_positions": sha256(file)}
        self._positions: list[int] = read_json(file)["rows"]
        self._found = dict.fromkeys(self._positions, b"")

    def offer(self, idx: int, row: bytes) -> None:
        if idx in self._found:
            self._found[idx] = row

    def missing(self, of_study_file: bool) -> str | None:
        return None if of_study_file else "its positions are of the study's msg-test.jsonl, which this is not"

    def rows(self) -> list[bytes]:
        return [self._found[idx] for idx in self._positions if self._found[idx]]


def draws(of_study: Study, sizes: Sequence[int], seed: int) -> dict[str, Draw | Listed]:
    """The study's subsets of its test rows, and draws of other sizes, by the names of their files."""
    subsets: dict[str, Draw | Listed] = {f"test-{size}": Draw(size, seed) for size in sizes}
    for name, subset in of_study.data.subsets.items():
        positions = subset.positions
        subsets[name] = Listed(of_study.folder / positions) if positions else Draw(subset.rows, subset.seed or 0)
    return subsets
