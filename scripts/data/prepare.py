"""Makes a study's rows of its raw files, as its study.yaml declares, and accounts for every one in a manifest."""

import time
from array import array
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Output, making
from ..base.locks import LOOK, PATIENCE, held, is_held
from ..base.progress import say
from . import manifest
from .declaration import SPLITS, Misdeclared, Order, Split, Subset
from .draws import PlacedRow, choose, draw, method, obstacle
from .expressions import BadRow, RowMaker
from .raw import RawFile, find
from .study import Study

PREPARE_LOCK = ".prepare.lock"


@dataclass(frozen=True)
class Wish:
    """How a user wants rows to be prepared otherwise than the study says.

    Attributes:
        row: expressions in the place of some of the study's, by field.
        valid_rows: how many rows to draw for validation; 0 keeps all, None draws as many as the study.
        subsets: sizes of further draws from the test rows, each for a test-<size>.jsonl.
        seed: of these draws; None is the study's for validation, and 42.
    """

    row: dict[str, str] = field(default_factory=dict)
    valid_rows: int | None = None
    subsets: Sequence[int] = ()
    seed: int | None = None


def prepare(
    raw: list[Path], out: Path, of_study: Study, input_format: str, wish: Wish = Wish(), patience: float = LOOK
) -> dict[str, Any]:
    """Write train.jsonl, valid.jsonl and test.jsonl, those for which there are raw files, and a manifest.

    The study's subsets of test.jsonl are written beside it. Rows are read as a stream, of which only those that others
    are drawn from or sorted with are held in memory, and 8 bytes a row. No file is replaced before every raw file was
    read without an error.

    Args:
        raw: the study's raw files, or zips or folders that hold them.
        out: the folder to write to.
        of_study: says how rows are made, and which subsets there are.
        input_format: one of the study's.
        wish: what is to be done otherwise.
        patience: seconds to wait for another process that is preparing data in the same folder.

    Returns:
        The manifest: for each split the rows read, kept, dropped by reason and duplicate, and checksums of the
        raw file and of what was written. Duplicates are counted and kept.

    Raises:
        UserError: a file is missing, empty, or has a row that no prepared one can be made of, an expression is none,
            or another process is preparing data in the folder.
    """
    for option, split, given in (
        ("--valid-rows", "valid", wish.valid_rows),
        ("--subset", "test", wish.subsets or None),
    ):
        if given is not None and split not in of_study.data.splits:
            raise UserError(
                f"{option}: the study has no {split} rows; its splits are {', '.join(of_study.data.splits)}"
            )
    for file in raw:
        if file.resolve() in {(out / f"{name}.jsonl").resolve() for name in SPLITS}:
            raise UserError(f"{file}: would be overwritten; write to another folder with --out")
    lock = held(out / PREPARE_LOCK, "another preparation is running", patience, remove=True)
    with making(out), lock, ExitStack() as stack:
        preparation = _Preparation(of_study, find(raw, of_study.data.raw_files), input_format, wish, out, stack)
        splits = preparation.splits()
        stack.close()  # puts the files in place
        return manifest.update(out, splits)


def check_expressions(of_study: Study) -> None:
    """Raise UserError, with file and line, for an expression of a study that is none."""
    for input_format in of_study.data.formats:
        for split in of_study.data.splits:
            _maker(of_study, split, input_format, {})


def _maker(of_study: Study, split: str, input_format: str, instead: dict[str, str]) -> RowMaker:
    """What makes the rows of a split.

    Raises:
        UserError: an expression is none.
    """
    data = of_study.data
    declared = data.splits[split]
    order = declared.order.longest_first if declared.order else None
    row = data.row_of(split, input_format, instead)
    try:
        return RowMaker(row, data.drop_of(split), data.carry if split == "test" else {}, order)
    except Misdeclared as error:
        part, key = error.at
        if part == "row" and key in instead:
            raise UserError(f"--row {key}: {error}") from None
        made_as = declared.out_of or split
        if part == "row" and key in data.formats[input_format].row:
            at: tuple[str, ...] = ("data", "input_formats", input_format, "row", key)
        elif part == "order" or (part != "carry" and getattr(data.splits[made_as], part) is not None):
            at = ("data", "splits", split if part == "order" else made_as, part, key)
        else:
            at = ("data", part, key)
        file = of_study.folder / "study.yaml"
        raise UserError(f"{file}:{yamlfiles.line_of(file, at)}: {'.'.join(at)}: {error}") from None


class _Counts:
    """How many raw rows were kept and dropped so far, and the hashes of those kept."""

    def __init__(self) -> None:
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.hashes = array("q")

    def duplicates(self) -> int:
        """How many rows are kept that are equal to an earlier one."""
        import numpy as np

        hashes = np.frombuffer(self.hashes, dtype=np.int64) if self.kept else np.empty(0)
        hashes.sort()  # in its place
        return int((hashes[1:] == hashes[:-1]).sum())


def _kept(raw: RawFile, maker: RowMaker, counts: _Counts, scored: bool) -> Iterator[PlacedRow]:
    """The rows to keep as JSON lines, each with its position in the raw file, and its value to be sorted by.

    Rows that are to be scored also have that position, as `idx`, and what the study has them carry.
    """
    for position, row in enumerate(raw.rows()):
        try:
            made, reason, carried, order = maker.make(row)
            if reason:
                counts.dropped[reason] += 1
                continue
            line = orjson.dumps(made)
            counts.hashes.append(hash(line))
            if scored:
                line = orjson.dumps(made | {"idx": position} | carried)
        except BadRow as error:
            raise UserError(f"{raw.where}: {error}") from None
        except TypeError as error:  # orjson's
            raise UserError(f"{raw.where}: its row cannot be written as JSON: {error}") from None
        counts.kept += 1
        yield position, line + b"\n", order


def _ordered(rows: Iterable[PlacedRow], order: Order | None) -> Iterator[PlacedRow]:
    rows = iter(rows)
    while order and (bucket := list(islice(rows, order.buckets))):
        yield from sorted(bucket, key=lambda row: row[2], reverse=True)
    yield from rows


@dataclass
class _Preparation:
    """The splits of a study that raw files are there for, and where they are written."""

    study: Study
    raw: dict[str, RawFile]
    input_format: str
    wish: Wish
    out: Path
    stack: ExitStack
    drawn: dict[str, tuple[list[PlacedRow], _Counts]] = field(default_factory=dict)

    def splits(self) -> dict[str, manifest.Entry]:
        """The manifest's entries of the splits, whose files take their places when the stack is closed."""
        data = self.study.data
        there = [name for name in SPLITS if name in data.splits and data.raw_file(name) in self.raw]
        for name in there:
            if data.splits[name].out_of:
                self._draw_out(name)
        return {name: self._split(name) for name in there}

    def _plan(self, name: str) -> Split:
        """How a split's rows are chosen, the user's wish included."""
        declared = self.study.data.splits[name]
        rows = self.wish.valid_rows
        if name != "valid" or rows is None:
            return declared
        if declared.out_of and not rows:
            raise UserError(f"--valid-rows 0: these rows are drawn out of {declared.out_of}; say how many")
        return declared.model_copy(update={"draw": rows, "take": None})

    def _seed(self, declared: Split) -> int:
        given = (self.wish.seed, declared.seed, 42)
        return next(seed for seed in given if seed is not None)

    def _draw_out(self, name: str) -> None:
        """Draw the rows of a split out of another one, before that is written without them."""
        plan = self._plan(name)
        counts = _Counts()
        rows = _kept(self.raw[self.study.data.raw_file(name)], self._maker(name), counts, name == "test")
        self.drawn[name] = draw(rows, plan.draw or 0, self._seed(plan)), counts

    def _maker(self, name: str) -> RowMaker:
        return _maker(self.study, name, self.input_format, self.wish.row)

    def _split(self, name: str) -> manifest.Entry:
        """Write a split's file, and subsets of the test rows; the manifest's entry."""
        splits = self.study.data.splits
        plan = self._plan(name)
        raw = self.raw[self.study.data.raw_file(name)]
        drawn_out: dict[str, list[PlacedRow]] = {}
        chosen: Iterable[PlacedRow]
        if plan.out_of:
            chosen, counts = self.drawn[name]
        else:
            counts = _Counts()
            of_others = {other: rows for other, (rows, _) in self.drawn.items()}
            drawn_out = {other: rows for other, rows in of_others.items() if splits[other].out_of == name}
            chosen = self._chosen(name, plan, counts, {row[0] for rows in drawn_out.values() for row in rows})
        rows: Iterable[PlacedRow] = _ordered(chosen, plan.order)
        test_rows = list(rows) if name == "test" and (plan.subsets or self.wish.subsets) else []
        written = self._write(name, test_rows or rows)
        if not written["rows"]:
            raise UserError(f"{raw.label}: no row is left to write; {dict(counts.dropped) or 'it has none'}")
        entry = self._entry(name, raw, counts, plan) | written
        if drawn_out:
            entry["drawn_out"] = {other: len(rows) for other, rows in drawn_out.items()}
        if name == "test":
            entry |= self._subsets(test_rows, bool(entry["is_the_study_file"]))
        return entry

    def _chosen(self, name: str, plan: Split, counts: _Counts, gone: Container[int]) -> Iterator[PlacedRow]:
        """The rows that are kept for a split, but for those at some positions. The raw file is read to its end, for the
        counts and its checksum."""
        kept = _kept(self.raw[self.study.data.raw_file(name)], self._maker(name), counts, name == "test")
        left = (row for row in kept if row[0] not in gone)
        if plan.draw:
            yield from draw(left, plan.draw, self._seed(plan))
        yield from islice(left, plan.take)
        deque(left, maxlen=0)

    def _entry(self, name: str, raw: RawFile, counts: _Counts, plan: Split) -> manifest.Entry:
        drawn: dict[str, Any] | None = None
        if plan.take and plan.take < counts.kept:
            drawn = {"first": plan.take}
        elif plan.draw and plan.draw < counts.kept:
            drawn = {"rows": plan.draw, "seed": self._seed(plan)}
        if drawn and plan.out_of:
            drawn["out_of"] = plan.out_of
        return {
            "input_format": self.input_format,
            **manifest.how_made(self.study, name, self.input_format, self.wish.row),
            "source": raw.label,
            "source_sha256": raw.sha256,
            "source_bytes": raw.bytes,
            "is_the_study_file": self._is_the_studys(raw, self.study.data.raw_file(name)),
            "read": raw.read,
            "kept": counts.kept,
            "dropped": dict(counts.dropped),
            "duplicates_kept": counts.duplicates(),
            "drawn": drawn,
        }

    def _is_the_studys(self, raw: RawFile, name: str) -> bool | None:
        """Whether what was read is a file of the study; None if it has as many rows, and no checksum is known."""
        known = self.study.data.files[name]
        if known.sha256 is None and known.rows in (None, raw.read):
            return None
        return raw.sha256 == known.sha256

    def _subsets(self, rows: list[PlacedRow], is_study_file: bool) -> manifest.Entry:
        """Write the subsets of the test rows; what the manifest says of them, and of those that there cannot be."""
        seed = 42 if self.wish.seed is None else self.wish.seed
        wished = {f"test-{size}": Subset(title=f"{size} rows", rows=size, seed=seed) for size in self.wish.subsets}
        entry: manifest.Entry = {"subsets": {}, "left_out": {}}
        for key, subset in (wished | self.study.data.subsets).items():
            if reason := obstacle(subset, len(rows), is_study_file):
                entry["left_out"][key] = reason
            else:
                chosen = choose(subset, self.study.folder, rows)
                entry["subsets"][key] = method(subset, self.study.folder) | self._write(key, chosen)
        return entry

    def _write(self, name: str, rows: Iterable[PlacedRow]) -> manifest.Entry:
        """Write a file of rows, which takes its place when the stack is closed; what the manifest says of it."""
        output = Output(self.stack, self.out / f"{name}.jsonl")
        count = 0
        for row in rows:
            output.write(row[1])
            count += 1
        return {"file": f"{name}.jsonl", "rows": count, "sha256": output.sha256()}


def wait_for_others(out: Path) -> None:
    """Return once no other process is preparing data in a folder, or after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    if is_held(out / PREPARE_LOCK):
        say(f"{out}: waiting for another process that prepares it")
    while is_held(out / PREPARE_LOCK) and time.monotonic() < deadline:
        time.sleep(0.1)
