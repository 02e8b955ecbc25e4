"""Checks of a config's rows without a tokenizer: JSON, fields, repeated and leaked rows."""

import codecs
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import orjson

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Row, json_rows, parse_json, reading
from ..base.yamlfiles import Config
from ..config import datafiles, models
from ..config.datafiles import DatasetRef
from ..config.finding import LEAKED, Faults, FaultyRows, Finding, Level
from ..training.row_types import Pairs, RowMistake, RowType, row_type


def check_rows(
    config: Config, wrong: Collection[str] = (), sample: int | None = None
) -> tuple[list[Finding], list[Row]]:
    """Find mistakes in local JSONL rows; also return each data set's size.

    Each file is streamed once. A hash of each row (some 100 bytes) stays in memory. It finds rows that repeat, and
    training rows that are also in the evaluation data or in test.jsonl beside it.

    Args:
        config: a config without the values that break the schema.
        wrong: keys with findings; a data set whose type is wrong is skipped, because its fields are unknown.
        sample: the number of rows to read from each data set, drawn over it; None for all.
    """
    special = models.find(config).special_tokens
    drops_repeated = bool(config.get("dataset_exact_deduplication"))
    findings: list[Finding] = []
    sizes = []
    seen: dict[int, str] = {}
    for dataset in datafiles.datasets(config):
        if f"{dataset.key}.type" in wrong:
            continue
        reader = _Reader(dataset, special, seen)
        reader.step = datafiles.stride(datafiles.count_jsonl(dataset.entry), sample)
        for file in reader.files:
            reader.read(file)
            for finding in file.findings():
                if not (drops_repeated and finding.rule == "repeated-row"):
                    findings.append(finding)
        findings += reader.notes()
        if reader.paths:
            sizes.append(reader.size())
    test = datafiles.test_file(config)
    if test and [test] not in [size["files"] for size in sizes]:
        findings += _leaked_rows(test, datafiles.training_sets(config)[0], seen)
    return findings, sizes


def _leaked_rows(test: str, dataset: DatasetRef, seen: dict[int, str]) -> list[Finding]:
    """Find training rows in a file of test rows that no data set names, in the format of a data set."""
    entry = dataset.entry | {"path": test, "split": None}
    reader = _Reader(DatasetRef("test_datasets", 0, entry, dataset.rl), None, seen)
    (file,) = reader.files
    file.key = ""
    reader.read(file)
    return [finding for finding in file.findings() if finding.rule == LEAKED]


def readable(kind: RowType, line: bytes) -> Row | None:
    """Row of a line, or None if a data set's type cannot read it."""
    try:
        row = next(json_rows([line], "", ()))
    except UserError:
        return None
    is_unreadable = any(mistake.is_unreadable for mistake in kind.mistakes(row))
    return None if is_unreadable else row


Place = tuple[str, int]
"""File and line."""


def lines_of(file: Path) -> Iterator[tuple[Place, bytes]]:
    """Lines of a file that are not blank, each with its place."""
    with reading(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield (str(file), number), line


class Wording(NamedTuple):
    """Words for rows with the same fault; in the problem, {n} is their number, {about} the fault's subject.

    Attributes:
        rule: name of the finding; by default the fault's.
    """

    level: Level
    problem: str
    remedy: str
    rule: str = ""

    def finding(self, key: str, fault: tuple[str, str], rows: FaultyRows) -> Finding:
        """Finding at the first of some rows with a fault, given by rule and subject."""
        rule, about = fault
        problem = self.problem.format(n=rows, about=about)
        return Finding(self.level, self.rule or rule, key, problem, self.remedy, *rows.place)


_AS_WRITTEN = ("completion", "input_output", "passthrough", "None")
"""Types whose rows have special tokens on purpose."""
LEAKED_ROWS = Wording("warning", "{n} also in the training data: scores mean little", "drop them from it")
_WORDING = {
    "bad-row": Wording("error", "{n}: {about}", "correct or drop these rows"),
    "other-fields": Wording(
        "error", "{n}: the type reads other fields: {about}", "correct or drop these rows", rule="bad-row"
    ),
    "empty-reference": Wording("warning", "{n} with an empty {about}: the model learns nothing", "drop these rows"),
    "equal-answers": Wording("error", "{n}: {about}, so that the pair shows no preference", "drop these rows"),
    "other-prompt": Wording("error", "{n}: {about}; Axolotl takes the chosen one's", "correct or drop these rows"),
    "swapped-pair": Wording("warning", "{n}: {about}", "swap the answers, or drop these rows"),
    "lacks-system": Wording(
        "error", "{n} without the field system, which Axolotl fills with None", 'add it; it can be ""'
    ),
    "no-format": Wording(
        "error", "{n} without {about}: Axolotl uses its own prompt instead of format", "set no_input_format"
    ),
    "misspelt-field": Wording("warning", "{n}: {about}", ""),
    "special-token": Wording(
        "warning",
        "{n} with the text {about}, which the tokenizer reads as a special token",
        "remove it, unless you mean the token",
    ),
    "repeated-row": Wording("warning", "{n}: repeated", "`dataset_exact_deduplication: true` drops them"),
    LEAKED: LEAKED_ROWS,
}


@dataclass
class _File:
    """A file of rows.

    Attributes:
        key: the key of the file's data set, with `.path`.
        rows: number of rows.
        has_system: a row has a system text.
        other_fields: fields of the last row that has none of the type's fields.
        faults: the faulty rows.
    """

    key: str
    path: Path
    rows: int = 0
    has_system: bool = False
    other_fields: Sequence[str] = ()
    faults: Faults = field(default_factory=Faults)

    def count(self, mistake: RowMistake, line: int, example: str = "") -> None:
        """Count one faulty row."""
        self.faults.note(mistake.rule, mistake.about, str(self.path), line, example)

    def findings(self) -> Iterator[Finding]:
        """A finding for each kind of mistake, at the mistake's first row."""
        if not self.rows and self.path.stat().st_size:  # another rule reports files of 0 bytes
            yield Finding("error", "bad-row", self.key, "no rows", where=str(self.path))
        for fault, rows in self.faults.items():
            rule = fault[0]
            if rule == "lacks-system" and not self.has_system:
                continue
            finding = _WORDING[rule].finding(self.key, fault, rows)
            finding.problem += example(rule, rows)
            if rule == "other-fields" and rows.count == self.rows:  # the type is wrong, not the rows
                finding.remedy = _type_remedy(self.other_fields)
            yield finding


def _type_remedy(fields: Sequence[str]) -> str:
    """Advice to set the type that reads rows with these fields."""
    form = datafiles.form_of(fields)
    entry = form.entry if form else {"type": {"field_output": "answer"}}
    return f"set {yamlfiles.write_flow(entry)[1:-1]} to read them"


def example(fault: str, rows: FaultyRows) -> str:
    """Example of a mistake, in parentheses; for copies of rows, the originals."""
    text = rows.first[0][2]
    if fault in ("repeated-row", LEAKED) and rows.count > 1:
        text = ", ".join(f"{line} = {original}" for _, line, original in rows.first)
    return f" ({text})" if text else ""


class _Reader:
    """Reads and checks the rows of one data set.

    Args:
        dataset: the data set.
        special: a regular expression for the tokenizer's special tokens, if they are known.
        seen: file and line where each training row first occurs, by the hash of its text; rows of training data are
            added.

    Attributes:
        step: distance of the rows to read.
        paths: existing files of the data set.
        files: those that are JSONL.
        unread: fields of the rows that the type does not read, at most `Faults.MOST_SUBJECTS`.
    """

    def __init__(self, dataset: DatasetRef, special: str | None, seen: dict[int, str]):
        self.dataset = dataset
        self.step = 1
        self.key = f"{dataset.key}.path"
        self.type = row_type(dataset.entry, dataset.rl)
        self.paths = datafiles.present_files(dataset.entry)
        self.files = [_File(self.key, path) for path in self.paths if path.suffix == ".jsonl"]
        self.special = None
        if special and dataset.type_name not in _AS_WRITTEN:
            self.special = re.compile(special)
        self.seen = seen
        self.unread = set[str]()

    def read(self, file: _File) -> None:
        """Count a file's rows, up to the data set's limit, and their mistakes."""
        lines = islice(lines_of(file.path), 0, datafiles.first_rows(self.dataset.entry), self.step)
        for (_, number), line in lines:
            file.rows += 1
            self._check_line(file, number, line)

    def notes(self) -> Iterator[Finding]:
        """Notes about files that are not JSONL."""
        for path in self.paths:
            if path.suffix != ".jsonl":
                problem, remedy = "not JSONL: missing fields and repeated rows are not reported", "convert it to JSONL"
                yield Finding("note", "not-checked", self.key, problem, remedy, str(path))

    def size(self) -> Row:
        """Files and number of rows; the number is None if Axolotl loads the rows."""
        paths, rows = self.paths, None
        if self.files:
            paths = [file.path for file in self.files]
            rows = sum(file.rows for file in self.files)
        files = [str(path) for path in paths]
        return {"key": self.dataset.key, "files": files, "rows": rows, "unread_fields": sorted(self.unread)}

    def _check_line(self, file: _File, number: int, line: bytes) -> None:
        try:
            row = parse_json(line)
        except orjson.JSONDecodeError as error:
            file.count(RowMistake("bad-row", "not JSON in UTF-8"), number, error.msg)
            return
        if isinstance(row, dict):
            self._check_row(file, number, row)
        else:
            file.count(RowMistake("bad-row", "not a mapping of fields to values"), number)

    def _check_row(self, file: _File, number: int, row: Row) -> None:
        for mistake in dict.fromkeys(self.type.mistakes(row)):  # once for each row, even if many messages have it
            if mistake.rule == "other-fields":
                file.other_fields = list(row)
                file.count(mistake, number, f"fields: {', '.join(row)}"[:80])
                return
            file.count(mistake, number)
        file.has_system = file.has_system or isinstance(row.get("system"), str)
        for name in row:
            if name not in self.type.names and len(self.unread) < Faults.MOST_SUBJECTS:
                self.unread.add(name)
        if isinstance(self.type, Pairs):  # before the row itself is remembered, whose answers can be equal
            self._check_order(file, number, self.type.content_of(self.type.swapped(row)))
        self._check_text(file, number, self.type.content_of(row))

    def _check_order(self, file: _File, number: int, swapped: str) -> None:
        """Find a pair whose answers are those of an earlier training pair, swapped."""
        if original := self.seen.get(hash(swapped)):
            mistake = RowMistake("swapped-pair", "an earlier pair prefers the other answer")
            file.count(mistake, number, original)

    def _check_text(self, file: _File, number: int, text: str) -> None:
        if text in ("[]", "{}"):
            return
        if self.special and (match := self.special.search(text)):
            file.count(RowMistake("special-token", match[0]), number)
        if not datafiles.has_all_lines(self.dataset.entry):
            return  # Axolotl takes a part of the rows
        if original := self.seen.get(hash(text)):
            rule = "repeated-row" if self.dataset.is_training else LEAKED
            file.count(RowMistake(rule), number, original)
        if self.dataset.is_training:
            self.seen.setdefault(hash(text), f"{file.path}:{number}")
