"""Draws from the rows of a file, rows at listed positions, and files of rows that take their place together."""

import hashlib
import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..base.files import clear_parts, read_json, replacing, sha256
from .study import Study


class Draw:
    """`size` rows drawn at random, each with the same chance, in their order; all where there are no more."""

    def __init__(self, size: int, seed: int):
        self.about = {"rows": size, "seed": seed}
        self._size, self._chance = size, random.Random(seed)
        self._offered = 0
        self._drawn: list[tuple[int, bytes]] = []

    def offer(self, idx: int, row: bytes) -> None:
        self._offered += 1
        if len(self._drawn) < self._size:
            self._drawn.append((idx, row))
        elif (place := self._chance.randrange(self._offered)) < self._size:
            self._drawn[place] = idx, row

    def missing(self, of_study_file: bool) -> str | None:
        return f"only {self._offered} rows to draw from" if self._offered < self._size else None

    def rows(self) -> list[bytes]:
        return [row for _, row in sorted(self._drawn)]


class Listed:
    """The rows at the positions that a file lists, in the order of that list; they count in the study's file only."""

    def __init__(self, file: Path):
        self.about = {"positions": file.name, "sha256_of_positions": sha256(file)}
        self._positions: list[int] = read_json(file)["rows"]
        self._wanted = set(self._positions)
        self._found: dict[int, bytes] = {}

    def offer(self, idx: int, row: bytes) -> None:
        if idx in self._wanted:
            self._found[idx] = row

    def missing(self, of_study_file: bool) -> str | None:
        return None if of_study_file else "its positions are of the study's msg-test.jsonl, which this is not"

    def rows(self) -> list[bytes]:
        return [self._found[idx] for idx in self._positions if idx in self._found]


def draws(of_study: Study, sizes: Sequence[int], seed: int) -> dict[str, Draw | Listed]:
    """The study's subsets of its test rows, and draws of other sizes."""
    made: dict[str, Draw | Listed] = {f"test-{size}": Draw(size, seed) for size in sizes}
    for name, subset in of_study.data.subsets.items():
        listed = subset.positions
        made[name] = Listed(of_study.folder / listed) if listed else Draw(subset.rows, subset.seed or 0)
    return made


class Written:
    """A file that takes its place when the stack is left well, and what was written to it."""

    def __init__(self, stack: ExitStack, file: Path):
        self.rows = 0
        self._file, self._digest = file, hashlib.sha256()
        clear_parts(file)
        self._stream = stack.enter_context(replacing(file))

    def add(self, row: bytes) -> None:
        self._stream.write(row)
        self._digest.update(row)
        self.rows += 1

    def as_json(self) -> dict[str, Any]:
        return {"file": self._file.name, "rows": self.rows, "sha256": self._digest.hexdigest()}
