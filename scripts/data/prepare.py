"""Prepare a study's rows from raw files, and write a manifest; also from its sample, for rehearsals."""

import hashlib
import random
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import batched, chain, islice
from pathlib import Path

import orjson

from ..base import paths
from ..base.errors import UserError
from ..base.files import Row, read_json, replacing, sha256
from ..base.processes import LOOK, held, make_once
from . import manifest, studies
from .declaration import SPLITS, Order, Subset
from .raw_rows import BadRow, Expression, RawFile, RowMaker, find_files
from .studies import Study, refusal

PREPARE_LOCK = ".prepare.lock"
VERSION = 2
"""Version of the preparation code; increase it when the same study and raw files give other rows."""
PlacedRow = tuple[int, bytes, float]  # position in the raw file, prepared line, and sort value


def prepare(
    raw: list[Path],
    out: Path,
    study: Study,
    input_format: str,
    timeout: float = LOOK,
) -> Row:
    """Write the splits whose raw files are given, and a manifest.

    Splits are train.jsonl, valid.jsonl and test.jsonl; subsets of the test rows are written beside them. Rows are
    streamed, and kept in memory only for sampling and sorting. Files are replaced only after all raw files were read
    without an error.

    Args:
        raw: raw files of the study, or folders with them.
        out: folder to write to.
        study: the study.
        input_format: name of one of the study's formats.
        timeout: seconds to wait for another process that prepares data in the same folder.

    Returns:
        The manifest: for each split the counts of rows read, kept and dropped by filter, and checksums of the raw files
        and of the written file.

    Raises:
        UserError: a file is missing or empty, a row cannot be prepared, an expression is invalid, or another process
            prepares data in the folder.
    """
    check_expressions(study)
    files = find_files(raw, study.data.raw_files)
    with held(out / PREPARE_LOCK, "another preparation is running", timeout), ExitStack() as stack:
        require_own(out, study, out / manifest.MANIFEST)
        splits = _Preparation(study, files, input_format, out, stack).splits()
        # before the stack moves the files into place: a killed process then leaves only files that the manifest lists
        return manifest.update(out, study, splits)


def require_own(out: Path, study: Study, file: Path) -> None:
    """Raise UserError for an existing file that the study's manifest does not list."""
    if file.exists() and not manifest.lists(out, study, file):
        problem = f"not replaced, because {study.folder.name}'s {manifest.MANIFEST} does not list it"
        raise UserError(problem, file=file, remedy="move it away")


def check_expressions(study: Study) -> None:
    """Raise UserError, with file and line, if a study has invalid expressions."""
    mistakes = []
    for key, text in study.data.expressions():
        try:
            Expression(key[-1], text)
        except ValueError as error:
            mistakes.append((key, str(error)))
    if mistakes:
        raise refusal(Path(paths.shown(study.folder / "study.yaml")), mistakes)


@dataclass
class _Preparation:
    """Preparation of a study's splits in one folder.

    Attributes:
        sampled: positions of the rows of splits that are sampled from other splits.
        order: positions of shuffled rows, by split.
        read: raw file of each split.
        counts: number of rows that each split leaves out, by reason; "" stands for kept rows.
    """

    study: Study
    raw: dict[str, Path]
    input_format: str
    out: Path
    stack: ExitStack
    sampled: dict[str, list[int]] = field(default_factory=dict)
    order: dict[str, list[int]] = field(default_factory=dict)
    read: dict[str, RawFile] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def splits(self) -> dict[str, Row]:
        """Write the splits whose raw files are given; return manifest entries.

        Closing the stack moves the files into place.
        """
        data = self.study.data
        for name in SPLITS:
            if name in data.splits and self.raw.keys() >= set(data.raw_files_of(name)):
                self.read[name] = RawFile(*(self.raw[file] for file in data.raw_files_of(name)))
                if data.splits[name].sample_from:  # sample first: the other split is written without these rows
                    self.sampled[name] = self._selection(name)
        return {name: self._split(name) for name in self.read}

    @cached_property
    def _lookups(self) -> dict[str, list[Row]]:
        """Rows of each lookup.

        Raises:
            UserError: a file is missing.
        """
        rows = {}
        for name, file in self.study.data.lookups.items():
            if file not in self.raw:
                raise UserError(f"{file}: not given, but all rows need it", remedy="give its folder, too")
            rows[name] = [*RawFile(self.raw[file]).rows()]
        return rows

    def _selection(self, name: str) -> list[int]:
        """Positions of the rows of a sampled or shuffled split, in order."""
        split = self.study.data.splits[name]
        source = split.sample_from or name
        moved = self._moved_positions(source)
        positions = self.order.get(source) or [row[0] for row in self._prepared_rows(name)]
        rest = [position for position in positions if position not in moved]
        if split.shuffle is not None:
            rest = shuffled(rest, split.shuffle)
            if split.sample_from:
                self.order[source] = rest
            return rest[: split.sample or split.first]
        if split.sample:
            return sample(rest, split.sample, split.seed)
        return rest[: split.first]

    def _moved(self, name: str) -> dict[str, list[int]]:
        """Positions of rows that are moved from a split, by the split that they are moved to."""
        splits = self.study.data.splits
        return {other: rows for other, rows in self.sampled.items() if splits[other].sample_from == name}

    def _moved_positions(self, name: str) -> set[int]:
        """Positions of all rows that are moved from a split."""
        return set(chain.from_iterable(self._moved(name).values()))

    def _rows_at(self, positions: Iterable[int], name: str) -> list[PlacedRow]:
        """Rows at positions of a split, in that order."""
        rank = {position: place for place, position in enumerate(positions)}
        rows = [row for row in self._prepared_rows(name) if row[0] in rank]
        return sorted(rows, key=lambda row: rank[row[0]])

    def _prepared_rows(self, name: str) -> Iterator[PlacedRow]:
        """Rows that the filters keep, as JSON lines, with raw position and sort value; counts all rows.

        Test rows also contain their raw position, in the field `idx`, and the study's extra fields.
        """
        data = self.study.data
        raw, order, is_scored = self.read[name], data.splits[name].order, name == "test"
        counts = self.counts[name] = Counter()
        maker = RowMaker(
            data.fields_of(name, self.input_format),
            data.filters_of(name),
            data.extra_fields if is_scored else {},
            order.longest_first if order else "0",
            **self._lookups,
        )
        for position, row in enumerate(raw.rows()):
            try:
                prepared, filter_name, extra, length = maker.make(row, raw.path.name, position)
                counts[filter_name or ""] += 1
                if filter_name is not None:
                    continue
                if is_scored:
                    prepared |= {"idx": position} | extra
                line = orjson.dumps(prepared)
            except BadRow as error:
                raise UserError(f"{raw.where}: {error}; the row's fields: {', '.join(row) or 'none'}") from None
            except TypeError as error:  # from orjson
                raise UserError(f"{raw.where}: the row cannot be written as JSON: {error}") from None
            yield position, line + b"\n", length

    def _split(self, name: str) -> Row:
        """Write the files of a split and its subsets; return the manifest entry."""
        data = self.study.data
        split, raw = data.splits[name], self.read[name]
        rows = _ordered(self._rows_of_split(name), split.order)
        if split.subsets:
            rows = list(rows)
        written = self._write(name, rows)
        account = self._account(name, raw)
        if not written["rows"]:
            dropped = account["dropped"] or "no rows"
            raise UserError(f"no rows left to write; dropped: {dropped}", file=raw.path)
        entry = manifest.how_made(self.study, name, self.input_format) | account | written
        if moved := self._moved(name):
            entry["moved"] = {other: len(rows) for other, rows in moved.items()}
        if name == "test":
            entry |= self._subsets(split.subsets, rows, bool(entry["is_the_study_file"]))
        return entry

    def _rows_of_split(self, name: str) -> Iterator[PlacedRow]:
        """Rows of a split, without those moved to other splits.

        All rows are read, so that the counts are complete.
        """
        split = self.study.data.splits[name]
        if name in self.sampled:
            yield from self._rows_at(self.sampled[name], name)
        elif split.sample or split.shuffle is not None or name in self.order:
            yield from self._rows_at(self._selection(name), name)
        else:
            moved = self._moved_positions(name)
            rest = (row for row in self._prepared_rows(name) if row[0] not in moved)
            yield from islice(rest, split.first)
            deque(rest, maxlen=0)  # read on, so that the counts include the rows after the first

    def _is_the_study_file(self, name: str, checksums: Iterable[str], rows: int) -> bool | None:
        """True if a split's raw files have the checksums in study.yaml; None if it has no checksum to compare.

        Without a checksum, another number of rows shows that they are other files.
        """
        data = self.study.data
        declared = [data.files[file].sha256 for file in data.raw_files_of(name)]
        for expected, checksum in zip(declared, checksums, strict=True):
            if expected not in (None, checksum):
                return False
        if None not in declared:
            return True
        if data.raw_rows_of(name) not in (None, rows):
            return False
        return None

    def _account(self, name: str, raw: RawFile) -> Row:
        counts = self.counts[name]
        checksums = {str(path): sha256(path) for path in raw.paths}
        return {
            "sources": checksums,
            "is_the_study_file": self._is_the_study_file(name, checksums.values(), raw.read),
            "read": raw.read,
            "kept": counts[""],
            "dropped": {reason: count for reason, count in counts.items() if reason},
        }

    def _subsets(self, subsets: Mapping[str, Subset], rows: Iterable[PlacedRow], is_study_file: bool) -> Row:
        """Write subsets of test rows; return entries, and reasons for omitted subsets."""
        entry: Row = {"subsets": {}, "left_out": {}}
        by_position = {row[0]: row for row in rows}
        for key, subset in subsets.items():
            chosen = [by_position[position] for position in choose(subset, self.study.folder, by_position)]
            if subset.positions and not is_study_file:
                entry["left_out"][key] = "its positions refer to the study's test file, but this is a different file"
            elif len(chosen) < subset.rows and not subset.positions:
                entry["left_out"][key] = f"only {len(chosen)} rows to sample from"
            else:
                entry["subsets"][key] = self._write(key, chosen)
        return entry

    def _write(self, name: str, rows: Iterable[PlacedRow]) -> Row:
        """Write a file and return its manifest entry; the stack moves the file into place."""
        file = self.out / f"{name}.jsonl"
        require_own(self.out, self.study, file)
        stream = self.stack.enter_context(replacing(file))
        digest, count = hashlib.sha256(), 0
        for _, line, _ in rows:
            stream.write(line)
            digest.update(line)
            count += 1
        return {"file": file.name, "rows": count, "sha256": digest.hexdigest()}


def _ordered(rows: Iterable[PlacedRow], order: Order | None) -> Iterable[PlacedRow]:
    return _sorted_in_buckets(rows, order.buckets) if order else rows


def _sorted_in_buckets(rows: Iterable[PlacedRow], size: int) -> Iterator[PlacedRow]:
    for bucket in batched(rows, size):
        yield from sorted(bucket, key=lambda row: row[2], reverse=True)


def sample(positions: Iterable[int], size: int, seed: int) -> list[int]:
    """Sample `size` positions uniformly, in ascending order; all if there are fewer."""
    chance = random.Random(seed)
    chosen: list[int] = []
    for count, position in enumerate(positions, start=1):
        if len(chosen) < size:
            chosen.append(position)
        else:
            place = chance.randrange(count)
            if place < size:
                chosen[place] = position
    return sorted(chosen)


def shuffled(positions: list[int], seed: int) -> list[int]:
    """Shuffle positions like `Dataset.shuffle` of the datasets library."""
    import numpy

    return [positions[place] for place in numpy.random.default_rng(seed).permutation(len(positions))]


def choose(subset: Subset, folder: Path, positions: Collection[int]) -> list[int]:
    """Choose positions for a subset of test rows: a sample, or those listed, in list order."""
    if subset.positions is None:
        return sample(positions, subset.rows, subset.seed or 0)
    return [position for position in read_json(folder / subset.positions)["rows"] if position in positions]


def rehearsal_data(study: Study, input_format: str) -> Path:
    """Prepare a study's sample in the cache, if necessary; return the folder."""
    content = [str(VERSION), study.data.model_dump_json(), input_format, *map(sha256, _raw_sample(study))]
    key = hashlib.sha256("".join(content).encode()).hexdigest()
    out = paths.cache() / f"sample-{study.folder.name}-{input_format}-{key[:16]}"
    return make_once(out, partial(_prepare_sample, study, input_format))


def _sample_folder(study: Study) -> Path:
    """Folder with the raw files of a study's sample."""
    return study.folder / str(study.data.sample)


def _raw_sample(study: Study) -> list[Path]:
    """Existing raw files of a study's sample."""
    return sorted(file for file in map(_sample_folder(study).joinpath, study.data.raw_files) if file.is_file())


def _prepare_sample(study: Study, input_format: str, out: Path) -> None:
    prepare(_raw_sample(study), out, _with_few_sampled(study), input_format)


def _with_few_sampled(study: Study) -> Study:
    """Copy of a study whose sampled splits take at most a quarter of the rows."""
    splits = dict(study.data.splits)
    for name, split in splits.items():
        if split.sample and split.sample_from:
            with (_sample_folder(study) / study.data.raw_files_of(name)[0]).open("rb") as lines:
                few = max(len(lines.readlines()) // 4, 1)
            splits[name] = split.model_copy(update={"sample": min(split.sample, few)})
    return study.model_copy(update={"data": study.data.model_copy(update={"splits": splits})})


def twin(path: str) -> Path | None:
    """Sample file that replaces a study's prepared file; None for other files."""
    for study, input_format in studies.prepared_formats(path):
        if study.data.sample:
            file = rehearsal_data(study, input_format) / Path(path).name
            return file if file.is_file() else None
    return None


def default_sample() -> Path:
    """Folder of sample rows with `alpaca` fields, for recipes without a study."""
    study = studies.find("haider2024")
    return rehearsal_data(study, next(iter(study.data.formats)))
