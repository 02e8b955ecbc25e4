"""The rows of a config's data: read as a stream, counted, and checked for what would spoil a training."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from ..base.yamlfiles import Config
from ..configs import datafiles, models
from .finding import Finding, Level


@dataclass(frozen=True)
class Fields:
    """The fields that a data set type reads from a row.

    Attributes:
        reference: the text that the model is to learn; None where a row has no one field for it.
        texts: further fields that have to be there, as text.
        optional: fields that are read where they are there.
        lists: fields that have to be there, as lists.
    """

    reference: str | None = None
    texts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()


_ALPACA = Fields("output", ("instruction",), ("input",))
_WITH_SYSTEM = Fields("output", ("instruction", "system"), ("input",))
_ORCA = Fields("response", ("question", "system_prompt"))
# By type, or by what stands before its colon; from axolotl/prompt_strategies and prompt_tokenizers.py.
FIELDS = {
    "alpaca": _ALPACA,
    "alpaca_chat": _ALPACA,
    "alpaca_chat.load_concise": _ALPACA,
    "alpaca_chat.load_no_prompt": _ALPACA,
    "alpaca_chat.load_qa": Fields("answer", ("question",)),
    "alpaca_chat.load_camel_ai": Fields("message_2", ("message_1",)),
    "alpaca_instruct": _ALPACA,
    "alpaca_instruct.load_no_prompt": _ALPACA,
    "alpaca_w_system": _WITH_SYSTEM,
    "alpaca_w_system.load_chat": _WITH_SYSTEM,
    "alpaca_w_system.load_instruct": _WITH_SYSTEM,
    "alpaca_w_system.load_open_orca": _ORCA,
    "alpaca_w_system.load_open_orca_chatml": _ORCA,
    "completion": Fields("text"),
    "context_qa": Fields("answer", ("article", "question")),
    "context_qa.load_404": Fields(None, ("article", "unanswerable_question")),
    "context_qa.load_v2": Fields("answer", ("context", "question")),
    "gpteacher": Fields("response", ("instruction",), ("input",)),
    "jeopardy": Fields("answer", ("question", "category")),
    "oasst": Fields("RESPONSE", ("INSTRUCTION",)),
    "summarizetldr": Fields("summary", ("article",)),
}


def fields_of(dataset: Config) -> Fields | None:
    """The fields that a data set's type reads; None where this project does not know them."""
    kind = dataset.get("type")
    if isinstance(kind, dict):
        named = {name: kind.get(f"field_{name}") or name for name in ("output", "instruction", "input", "system")}
        return Fields(named["output"], (named["instruction"],), (named["input"], named["system"]))
    if kind is None:
        return Fields(lists=("input_ids", "attention_mask", "labels"))  # tokenized before
    if kind == "completion":
        return Fields(dataset.get("field") or "text")
    if kind == "chat_template":
        return Fields(lists=(dataset.get("field_messages") or "messages",))
    return FIELDS.get(str(kind).partition(":")[0])


_INSTRUCT = ("### Instruction:", "### Input:", "### Response:")
_STYLES = {
    "chat": ("USER: ", "\nASSISTANT:"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "phi": ("<|user|>", "<|end|>", "<|assistant|>"),
}


def markers_of(dataset: Config) -> tuple[str, ...]:
    """What an alpaca prompt sets its parts off with; within a row's text it would end a part too early."""
    kind, _, style = str(dataset.get("type")).partition(":")
    if kind in ("alpaca", "alpaca_instruct", "gpteacher", "alpaca_w_system.load_instruct"):
        return _STYLES.get(style, _INSTRUCT)
    return _STYLES["chat"] if kind.startswith("alpaca_chat") else ()


# What no text of a review or a program should hold: control characters but tab and line ends, and U+FFFD, which is
# what is left of a character in another encoding.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")


_BOM = b"\xef\xbb\xbf"


@dataclass
class _Kind:
    """Rows with the same mistake: how many, and the first of them."""

    count: int = 0
    first: int = 0
    example: str = ""


@dataclass
class _File:
    """What was read of one file of a data set."""

    key: str
    path: Path
    rows: int = 0
    bytes: int = 0
    kinds: dict[tuple[str, str], _Kind] = field(default_factory=lambda: defaultdict(_Kind))

    def found(self, rule: str, about: str, line: int, example: str = "") -> None:
        """Count a row of a kind."""
        kind = self.kinds[rule, about]
        kind.count += 1
        if kind.count == 1:
            kind.first, kind.example = line, example


def check(config: Config) -> tuple[list[Finding], list[dict[str, Any]]]:
    """What is wrong with the rows of a config's local JSONL files, and how many rows and bytes each data set has.

    Each file is read once, as a stream; of each row two hashes are kept (some 200 bytes), to find rows that repeat
    within the training data, or that evaluation data has in common with it.

    Args:
        config: a config without what breaks the schema.
    """
    special = models.find(config).special_tokens
    found: list[Finding] = []
    read: list[dict[str, Any]] = []
    seen: dict[int, str] = {}
    for key, dataset in datafiles.datasets(config):
        trained = key.startswith("datasets")
        reader = _Reader(dataset, special, seen, trained)
        jsonl = datafiles.jsonl_files(dataset)
        files = [_File(key, path) for path in jsonl]
        for file in files:
            reader.read(file, datafiles.first_rows(dataset))
            found += _findings(file)
        if files:
            rows, size = sum(file.rows for file in files), sum(file.bytes for file in files)
            read.append({"key": key, "files": [str(path) for path in jsonl], "rows": rows, "bytes": size})
        for path in datafiles.local_files(dataset):
            if path.is_file() and path not in jsonl:
                found.append(Finding("note", "not-checked", f"{key}.path", f"{path} is no JSONL file", where=str(path)))
        if files and reader.fields is None:
            problem = f"the fields that type {dataset.get('type')} reads are not known here, and not checked"
            found.append(Finding("note", "not-checked", f"{key}.type", problem, where=str(dataset.get("path"))))
    return found, read


class _Reader:
    """Reads the rows of one data set.

    Args:
        dataset: its entry in the config.
        special: a regular expression for the model's special tokens.
        seen: where a row of the training data was seen first, by the hash of its text, as it is and folded.
        trained: whether it is training data, whose rows are added to `seen`.
    """

    def __init__(self, dataset: Config, special: str | None, seen: dict[int, str], trained: bool):
        self.fields, self.seen, self.trained = fields_of(dataset), seen, trained
        self.markers = markers_of(dataset)
        self.special = re.compile(special) if special else None

    def read(self, file: _File, limit: int | None) -> None:
        """Count a file's rows, or the first so many, and what is wrong with them."""
        with file.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if limit is not None and file.rows >= limit:
                    break
                file.bytes += len(line)
                if number == 1 and line.startswith(_BOM):
                    file.found("byte-order-mark", "", number)
                    line = line.removeprefix(_BOM)
                if not line.strip():
                    continue
                file.rows += 1
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    file.found("bad-row", "no JSON" if line.isascii() else _encoding(line), number, str(error)[:60])
                    continue
                if isinstance(row, dict):
                    self._row(file, number, line, row)
                else:
                    file.found("bad-row", "no mapping of fields to values", number)

    def _row(self, file: _File, number: int, line: bytes, row: dict[str, Any]) -> None:
        fields = self.fields or Fields()
        texts = []
        for name in (*fields.texts, *((fields.reference,) if fields.reference else ())):
            value = row.get(name)
            if isinstance(value, str):
                texts.append(value)
            else:
                file.found("bad-row", f"{'no text' if name in row else 'nothing'} in the field {name}", number)
        for name in fields.optional:
            value = row.get(name)
            if isinstance(value, str):
                texts.append(value)
            elif value is not None:
                file.found("bad-row", f"no text in the field {name}", number)
        for name in fields.lists:
            if not isinstance(row.get(name), list) or not row[name]:
                file.found("bad-row", f"no list in the field {name}", number)
        if fields.reference and isinstance(reference := row.get(fields.reference), str) and not reference.strip():
            file.found("empty-reference", fields.reference, number)
        text = "\n".join(texts) if self.fields and not fields.lists else line.decode()
        self._text(file, number, line, text)

    def _text(self, file: _File, number: int, line: bytes, text: str) -> None:
        for marker in self.markers:
            if marker in text:
                file.found("prompt-marker", marker.strip(), number)
        if self.special and (match := self.special.search(text)):
            file.found("special-token", match[0], number)
        # JSON escapes nearly all of them, so that most rows need no search
        may_have = not line.isascii() or any(sign in line for sign in (b"\\u", b"\\b", b"\\f", b"\x7f"))
        if may_have and (match := _CONTROL.search(text)):
            file.found("control-character", f"U+{ord(match[0]):04X}", number)
        exact, folded = hash(text), hash(" ".join(text.split()))
        before = self.seen.get(exact)
        if before:
            file.found("repeated-row" if self.trained else "leaked-row", "", number, before)
        elif not self.trained and (before := self.seen.get(folded)):
            file.found("leaked-row", " but for white space", number, before)
        if self.trained:
            where = f"{file.path}:{number}"
            self.seen.setdefault(exact, where)
            self.seen.setdefault(folded, where)


def _encoding(line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return "no JSON"


# level, problem and remedy by rule; {n} rows, {about} what the kind is, {example} of the first row
_WORDS: dict[str, tuple[Level, str, str]] = {
    "bad-row": ("error", "{n} with {about}", "correct or drop them"),
    "byte-order-mark": ("warning", "a byte order mark before {n}", "save the file as UTF-8 without one"),
    "empty-reference": ("warning", "{n} with an empty {about}: nothing is learnt from them", "drop them"),
    "prompt-marker": ("warning", "{n} with {about}, which the prompt uses itself", "drop them, or use another type"),
    "special-token": ("warning", "{n} with the text {about}, which the tokenizer reads as its special token", ""),
    "control-character": ("warning", "{n} with the control character {about}", "clean or drop them"),
    "repeated-row": ("warning", "{n} seen before", ""),
    "leaked-row": ("warning", "{n} that the training data has too{about}: their score says little", "drop them there"),
}


def _findings(file: _File) -> Iterator[Finding]:
    """One finding for each kind of mistake in a file, at the first row that has it."""
    if file.bytes and not file.rows:  # a file of no bytes is a finding already
        yield Finding("error", "bad-row", f"{file.key}.path", "no rows", where=str(file.path))
    for (rule, about), kind in file.kinds.items():
        level, problem, remedy = _WORDS[rule]
        rows = "1 row" if kind.count == 1 else f"{kind.count} rows"
        text = problem.format(n=rows, about=about) + (f" ({kind.example})" if kind.example else "")
        yield Finding(level, rule, f"{file.key}.path", text, remedy, str(file.path), kind.first)
