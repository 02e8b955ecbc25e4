"""Checks of a config's rows without a tokenizer: JSON, fields, repeated and leaked rows."""

import codecs
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from ..base import yamlfiles
from ..base.files import Row, parse_json
from ..base.yamlfiles import Config
from ..config import datafiles, models
from ..config.finding import Faults, Finding, Level
from ..training.row_fields import Fields, content_of, fields_of, names_of


@lru_cache(1000)
def misspelt(names: tuple[str, ...], known: tuple[str, ...]) -> dict[str, str]:
    """Missing fields of a row, each with the misspelt name that the row has instead.

    `inptu` counts as a misspelt `input`; `output` does not, because it resembles `input` too little.
    """
    missing = [name for name in known if name not in names]
    near = {name: get_close_matches(name, missing, 1, 0.75) for name in names if name not in known}
    return {close[0]: name for name, close in near.items() if close}


@dataclass
class _File:
    """Size of one data file, and the faults in it."""

    key: str
    path: Path
    rows: int = 0
    has_system: bool = False
    faults: Faults = field(default_factory=Faults)

    def count(self, rule: str, about: str, line: int, example: str = "") -> None:
        """Count one faulty row."""
        self.faults.note(rule, about, str(self.path), line, example)


def check(config: Config, wrong: Collection[str] = ()) -> tuple[list[Finding], list[Row]]:
    """Find mistakes in local JSONL rows; also return each data set's size.

    Each file is streamed once. A hash of each row (some 100 bytes) stays in memory, to find rows that repeat within
    the training data, or that the evaluation data shares with the training data.

    Args:
        config: a config without the values that break the schema.
        wrong: keys with findings; a data set whose type is wrong is skipped, because its fields are unknown.
    """
    special = models.find(config).special_tokens
    findings: list[Finding] = []
    read: list[Row] = []
    seen: dict[int, str] = {}
    for dataset in datafiles.datasets(config):
        key, entry = dataset.key, dataset.entry
        if f"{key}.type" in wrong:
            continue
        reader = Reader(entry, special, seen, trained=dataset.is_training)
        files = [_File(key, path) for path in datafiles.jsonl_files(entry)]
        for file in files:
            reader.read(file, datafiles.first_rows(entry))
            findings += _findings(file)
        there = [path for path in datafiles.local_files(entry) if path.is_file()]
        for path in there:
            if path.suffix != ".jsonl":
                problem, remedy = "not JSONL: missing fields and repeated rows are not reported", "convert it to JSONL"
                findings.append(Finding("note", "not-checked", f"{key}.path", problem, remedy, str(path)))
        if there:
            read.append(
                {
                    "key": key,
                    "files": [str(file.path) for file in files] or [*map(str, there)],
                    "rows": sum(file.rows for file in files) if files else None,  # Axolotl loads other formats
                    "unread_fields": sorted(reader.unread),
                }
            )
    return findings, read


class Reader:
    """Reads and checks the rows of one data set.

    Args:
        dataset: the data set's entry in the config.
        special: a regular expression for the tokenizer's special tokens, if they are known.
        seen: file and line where each training row first occurs, by the hash of its text.
        trained: true for training data, whose rows are added to `seen`.

    Attributes:
        unread: text fields of the rows that the type does not read, at most `Faults.MOST_SUBJECTS`.
    """

    def __init__(self, dataset: Config, special: str | None, seen: dict[int, str], *, trained: bool):
        kind = dataset.get("type")
        self.fields = fields_of(dataset) or Fields()
        self.names = names_of(dataset)
        # the author of an input_output row writes special tokens on purpose
        self.special = re.compile(special) if special and kind != "input_output" else None
        # without no_input_format, Axolotl uses its own prompt for rows without input (user_defined.py)
        self.needs_input = isinstance(kind, dict) and kind.get("format") and not kind.get("no_input_format")
        self.seen = seen
        self.trained = trained
        self.unread = set[str]()

    def read(self, file: _File, limit: int | None) -> None:
        """Count a file's rows, up to a limit, and their mistakes."""
        with file.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if limit is not None and file.rows >= limit:
                    break
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    file.rows += 1
                    self._line(file, number, line)

    def readable(self, line: bytes) -> Row | None:
        """Row of a line, if it has the fields that the data set's type reads."""
        scratch = _File("", Path())
        row = self._line(scratch, 1, line)
        return None if any(rule == "bad-row" for rule, _ in scratch.faults) else row

    def _line(self, file: _File, number: int, line: bytes) -> Row | None:
        try:
            row: Any = parse_json(line)
        except orjson.JSONDecodeError as error:
            file.count("bad-row", "not JSON in UTF-8", number, error.msg)
            return None
        if isinstance(row, dict):
            self._row(file, number, row)
            return row
        file.count("bad-row", "not a mapping of fields to values", number)
        return None

    def _row(self, file: _File, number: int, row: Row) -> None:
        fields = self.fields
        meant = misspelt(tuple(row), self.names)
        required = [name for name in self.names if name not in fields.optional]
        if required and not meant and not any(name in row for name in self.names):
            about = f"the type reads other fields: {', '.join(required)}"
            file.count("bad-row", about, number, f"fields: {', '.join(row)}"[:80])
            return
        for name in self.names:
            value = row.get(name)
            if name in meant:
                rule = "misspelt-field" if name in fields.optional else "bad-row"
                file.count(rule, f"the field {meant[name]}; did you mean {name}?", number)
            elif name in fields.lists:
                if not value or not isinstance(value, list | str):  # a chat can hold its messages as JSON text
                    file.count("bad-row", f"the field {name} is missing or not a list", number)
            elif not isinstance(value, str) and (name not in fields.optional or not (value is None or fields.lists)):
                file.count("bad-row", f"the field {name} is {'not text' if name in row else 'missing'}", number)
            elif name == fields.reference and not (value or "").strip():
                file.count("empty-reference", name, number)
        for name in row:
            if name not in self.names and isinstance(row[name], str) and len(self.unread) < Faults.MOST_SUBJECTS:
                self.unread.add(name)
        if fields.items:
            self._items(file, number, row)
        if self.needs_input and not row.get(fields.optional[0]):
            file.count("no-format", fields.optional[0], number)
        text = content_of(row, self.names)
        if text not in ("[]", "{}"):
            self._text(file, number, text)

    def _items(self, file: _File, number: int, row: Row) -> None:
        """Check the messages of a chat, or the segments of an input_output row."""
        fields = self.fields
        known = (*fields.items, *fields.optional_items)
        items: Any = row.get(fields.lists[0])
        for item in items if isinstance(items, list) else ():
            if not isinstance(item, dict):
                file.count("bad-row", f"an item of {fields.lists[0]} is not a mapping", number)
                continue
            meant = misspelt(tuple(item), known)
            for name in known:
                lacks = name in fields.items and item.get(name) is None and not item.get("tool_calls")
                if name in meant:
                    about = f"the field {meant[name]} in {fields.lists[0]}; did you mean {name}?"
                    file.count("bad-row" if lacks else "misspelt-field", about, number)
                elif lacks:
                    file.count("bad-row", f"an item of {fields.lists[0]} lacks {name}", number)
            if item is items[-1] and str(item.get(fields.items[1])).isspace() and not item.get("tool_calls"):
                file.count("empty-reference", fields.items[1], number)
            if isinstance(item.get("label"), str) and "label" in fields.items:
                file.count("bad-row", "label is text; Axolotl reads any text as true", number)
        if fields.optional and isinstance(items, list) and items and isinstance(items[0], dict):
            system = row.get("system")
            file.has_system = file.has_system or isinstance(system, str)
            if system is None and items[0].get(fields.items[0]) != "system":
                file.count("lacks-system", "", number)

    def _text(self, file: _File, number: int, text: str) -> None:
        if self.special and (match := self.special.search(text)):
            file.count("special-token", match[0], number)
        if before := self.seen.get(hash(text)):
            file.count("repeated-row" if self.trained else "leaked-row", "", number, before)
        if self.trained:
            self.seen.setdefault(hash(text), f"{file.path}:{number}")


# level, problem and remedy by rule; {n}: the number of rows, {about}: the kind of mistake
_WORDS: dict[str, tuple[Level, str, str]] = {
    "bad-row": ("error", "{n}: {about}", "correct or drop these rows"),
    "empty-reference": ("warning", "{n} with an empty {about}: the model learns nothing", "drop these rows"),
    "lacks-system": ("error", "{n} without the field system, which Axolotl fills with None", 'add it; it can be ""'),
    "no-format": (
        "error",
        "{n} without {about}: Axolotl uses its own prompt instead of format",
        "set no_input_format",
    ),
    "misspelt-field": ("warning", "{n}: {about}", ""),
    "special-token": ("warning", "{n} with the text {about}, which the tokenizer reads as a special token", ""),
    "repeated-row": ("warning", "{n}: repeated", "`dataset_exact_deduplication: true` drops them"),
    "leaked-row": ("warning", "{n} also in the training data: scores mean little", "drop them from it"),
}


def _findings(file: _File) -> Iterator[Finding]:
    """One finding per kind of mistake in a file, at the mistake's first row."""
    if not file.rows and file.path.stat().st_size:  # another rule reports files of 0 bytes
        yield Finding("error", "bad-row", f"{file.key}.path", "no rows", where=str(file.path))
    for (rule, about), rows in file.faults.items():
        if rule == "lacks-system" and not file.has_system:
            continue
        level, problem, remedy = _WORDS[rule]
        example = rows.first[0][2]
        if example.startswith("fields: ") and rows.count == file.rows:  # the type is wrong, not the rows
            form = datafiles.form_of(example.removeprefix("fields: ").split(", "))
            remedy = f"set {yamlfiles.write_flow(form or {'type': {'field_output': 'answer'}})[1:-1]} to read them"
        if rule in ("repeated-row", "leaked-row") and rows.count > 1:
            example = ", ".join(f"{line} = {original}" for _, line, original in rows.first)
        shown = f" ({example})" if example else ""
        text = problem.format(n=rows, about=about)
        yield Finding(level, rule, f"{file.key}.path", f"{text}{shown}", remedy, *rows.place)
