"""A user's rows for `recipe new --data`: their columns, and chats made from questions and answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, write_rows
from ..base.yamlfiles import Config
from ..config import datafiles, merging, models
from ..config.datafiles import FORMS, Form
from ..config.merging import Override
from ..data.raw_rows import RawFile

Type = Literal["chat", "plain"]
"""Prompts of questions: by the chat template, or without it."""
HELD_OUT, HELD_OUT_OF_FEW = 0.05, 0.2
"""Shares of rows held out for the eval loss: if the recipe holds out none, and of fewer than `FEW` rows."""
_TYPE = ["datasets", "0", "type"]
_SUFFIXES = ".jsonl, .json, .csv, .tsv, .txt, .parquet"
_SHAREGPT_ROLES = {"system": ["system"], "user": ["human", "user"], "assistant": ["gpt", "assistant"]}
FEW = 200
"""Number of rows of which 5 % are too few to compare scores."""


@dataclass(frozen=True)
class RowsRequest:
    """Rows to train on, and options about them.

    Attributes:
        file: JSON lines, a JSON array, Parquet, or columns with any delimiter.
        fields: columns by field; empty for columns with the names of fields.
        type: the prompts of questions; None to choose by the base model.
    """

    file: Path
    fields: dict[str, str]
    type: Type | None


@dataclass
class OwnRows:
    """Rows in a user's file.

    Attributes:
        file: the file.
        copy: the file for the rows as Axolotl reads them, if it cannot read `file`.
        form: the form of the rows.
        fields: the field of each column that the form reads.
        entry: the data set entry, without path.
        reason: the reason for the prompts; empty if the user sets them.
        left_out: places of rows without a question or an answer, after `copied`.
        dropped: columns that the copy lacks, after `copied`.
    """

    file: Path
    copy: Path
    form: Form
    fields: dict[str, str]
    entry: Config
    reason: str = ""
    left_out: list[str] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)

    @property
    def are_chats(self) -> bool:
        """True if questions and answers become chats."""
        return self.form.is_pair and self.entry["type"] == "chat_template"

    @property
    def path(self) -> Path:
        """File that Axolotl reads: the user's, or its copy."""
        is_renamed = list(self.fields) != list(self.fields.values())
        if self.are_chats or is_renamed or self.file.suffix != ".jsonl":
            return self.copy
        return self.file

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Copy the rows if necessary; delete the copy if the block fails.

        Raises:
            UserError: a row cannot be read, or a file is in the copy's place.
        """
        if self.path == self.file:
            yield
            return
        if self.copy.exists():
            remedy = "choose another name, or delete this file"
            raise UserError("has the rows of an earlier variant", file=paths.shown(self.copy), remedy=remedy)
        try:
            write_rows(self.copy, self._rows())
            if self.copy.stat().st_size == 0:
                raise UserError(f"no row has {' and '.join(self.form.fields)}", file=self.file)
            yield
        except BaseException:
            self.copy.unlink(missing_ok=True)
            raise

    def _rows(self) -> Iterator[Row]:
        """Rows as Axolotl reads them. They keep texts of other columns, which a type set by the user can read."""
        source = RawFile(self.file)
        for raw in source.rows():
            row: Row = {}
            # columns that are read come last: another column can have a field's name
            for column, value in sorted(raw.items(), key=lambda item: item[0] in self.fields):
                if column in self.fields or isinstance(value, str):
                    row[self.fields.get(column, column)] = value
                else:
                    self.dropped.add(column)
            if self.form.is_pair and not self._prepare(row, source.where):
                self.left_out.append(source.where)
            else:
                yield row

    def _prepare(self, row: Row, where: str) -> bool:
        """Prepare question and answer in a row; return False if one is missing."""
        for name in self.form.fields:
            row[name] = _text(row.get(name), f"{where}: {name}")
            if not row[name].strip():
                return False
        if self.are_chats:
            question, answer = map(row.pop, self.form.fields)
            addition = row.pop("input", None)
            if addition:
                question += f"\n{addition}"
            row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return True


def _text(value: Any, where: str) -> str:
    """Value as a text: numbers are written out, and nothing is an empty text."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if type(value) in (int, float):
        return str(value)
    raise UserError(f"{where} is not a text")


def _first_row(file: Path) -> Row:
    """First row of a file.

    Raises:
        UserError: the file is missing, has no rows, or cannot be read.
    """
    if not file.is_file():
        raise UserError(f"--data {file}: {paths.absence(file)}")
    if file.suffix.lower() not in _SUFFIXES.split(", "):
        raise UserError(f"--data {file}: not one of {_SUFFIXES}; save it as CSV or JSON")
    row = next(RawFile(file).rows(), None)
    if not row:
        raise UserError("no rows", file=file)
    return row


def _columns(row: Row, request: RowsRequest) -> dict[str, str]:
    """Columns by field: those that the user names, and those with the name of a field."""
    for name, column in request.fields.items():
        if column not in row:
            raise UserError(f"--fields {name}={column}: the columns of {request.file} are {', '.join(row)}")
    return {column.strip().lower(): column for column in row} | request.fields


def recognize(request: RowsRequest, copy: Path) -> OwnRows:
    """Recognize the form of rows by the columns of the first one.

    Args:
        request: the rows.
        copy: the file for a copy of the rows.

    Raises:
        UserError: the file cannot be read, its columns match no form, or the form lacks one of the user's fields.
    """
    file, fields = request.file, request.fields
    row = _first_row(file)
    columns = _columns(row, request)
    form = datafiles.form_of(fields) or datafiles.form_of(columns)
    if form is None:
        forms = "; ".join(" and ".join(form.fields) for form in FORMS)
        remedy = "map columns to these, as in `--fields question=Frage,answer=Antwort`"
        raise UserError(f"unknown columns {', '.join(row)}; known are {forms}", file=file, remedy=remedy)
    read = (*form.fields, "input", "system", "tools")
    for name, column in fields.items():
        if name not in read:
            raise UserError(f"--fields {name}={column}: no field of the rows; they have {' and '.join(form.fields)}")
    if form.has_preferences and {"1.role", "1.from"} & dict(merging.flatten(row[columns["chosen"]])).keys():
        form = datafiles.CONVERSATIONS
    entry = form.entry
    if "0.from" in dict(merging.flatten(row[columns[form.fields[0]]])):  # ShareGPT's keys of a message
        entry = entry | {"message_property_mappings": {"role": "from", "content": "value"}}
        if form.has_preferences:
            entry |= {"roles": _SHAREGPT_ROLES}
    return OwnRows(file, copy, form, {columns[name]: name for name in read if name in columns}, entry)


def starting_point(request: RowsRequest | None) -> str:
    """Recipe to start from for rows, or without any; raises as `recognize` does."""
    if request and recognize(request, request.file).form.has_preferences:
        return "start/dpo-qlora"
    return "start/qlora"


def set_prompts(rows: OwnRows, requested: Type | None, config: Config, overrides: Sequence[Override]) -> None:
    """Make chats of questions and answers if the user or the config's base model requires it, and give the reason.

    LLaMA-Factory and Unsloth, too, write questions and answers with the template of an instruct model.

    Args:
        rows: the rows.
        requested: the prompts that the user requests.
        config: the config, whose base model decides without a request.
        overrides: the user's changes; one of the type leaves the rows as they are.

    Raises:
        UserError: the user requests a type for rows that are not pairs, or the config trains on other rows.
    """
    if rows.form.has_preferences != bool(config.get("rl")):
        problem = f"the rows have {' and '.join(rows.form.fields)}, and rl is {config.get('rl', 'not set')}"
        raise UserError(problem, file=rows.file, remedy="leave --from out, or name a recipe for such rows")
    if not requested and any(override.key.split(".")[:3] == _TYPE for override in overrides):
        return
    if not rows.form.is_pair:
        if requested:
            raise UserError(f"--type: only for questions and answers; the rows have {rows.form.fields[0]}")
        rows.reason = "because of their fields; --set changes it"
        return
    is_chat, rows.reason = requested == "chat", "as --type says"
    if not requested:
        name, model = config.get("base_model"), models.find(config)
        is_chat = model.chat is not False
        rows.reason = f"because {name} is a base model; --type chat makes chats"
        if is_chat:
            rows.reason = f"because {name} is an instruct model; --type plain omits its template"
        if model.chat is None:
            rows.reason = f"because {name} may be an instruct model; for a base model, --type plain"
    if is_chat:
        rows.entry = {"type": "chat_template"}


def overrides(rows: OwnRows, config: Config) -> list[Override]:
    """Overrides that train a config on rows, with a held-out share unless the config has test rows of the user."""
    changes = [Override("datasets", [{"path": str(rows.path)} | rows.entry]), Override("test_datasets", None)]
    if not str(rows.entry["type"]).startswith("chat_template"):
        changes += [Override("chat_template", None), Override("chat_template_jinja", None)]
    elif not config.get("chat_template"):
        changes.append(Override("chat_template", "tokenizer_default"))
    share = config.get("val_set_size") or HELD_OUT
    if config.get("test_datasets"):
        share = None
    elif datafiles.count_rows(rows.path) < FEW:
        share = HELD_OUT_OF_FEW
    return [*changes, Override("val_set_size", share)]


def explanations(rows: OwnRows, config: Config, unread: Sequence[str]) -> Iterator[str]:
    """Explain the settings that the rows require, one per line.

    Args:
        rows: the rows.
        config: the variant's config.
        unread: fields that Axolotl does not read.
    """
    if rows.path == rows.copy:
        yield f"rows: {datafiles.count_rows(rows.copy):,} of {rows.file}, copied to {paths.shown(rows.copy)}"
    if rows.left_out:
        yield f"left out: {len(rows.left_out):,} without question or answer, the first at {rows.left_out[0]}"
    if rows.reason:
        yield f"prompts: {yamlfiles.write_flow(rows.entry)[1:-1]}, {rows.reason}"
    share = config.get("val_set_size")
    if share:
        use = "rewards" if rows.form.has_preferences else "`recipe evaluate`"
        example = "--set val_set_size=20 holds out 20 rows"
        yield f"held out: val_set_size {share}, for the eval loss and {use}; {example}"
    unused = sorted({*unread, *rows.dropped})
    if unused:
        yield f"not used: {', '.join(unused)}; add the content to a field that is used"
