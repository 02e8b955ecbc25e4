"""Read raw rows, and prepare them by the Jinja expressions in study.yaml.

Jinja's sandbox evaluates the expressions, with a bound on what they compute.
"""

import codecs
import csv
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import IO, Any

import jinja2
import orjson
from jinja2 import filters, meta
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..base.errors import UserError, recipe_command
from ..base.files import Row, json_rows, parse_json, reading
from .declaration import Data

MOST = 1_000_000
"""Largest number of characters, items or bits that an operator or a filter can create."""
MOST_TEXT = 2000  # characters of an expression
MOST_EXPANDED = 1 << 27
"""Largest size in bytes of a Parquet file's rows, in addition to a thousand times the file's."""
_DELIMITERS = "\t;|^~,"
"""Delimiters of columns; a comma comes last, because it can be in a column's name."""
_FILTERS = (
    "abs capitalize count d default dictsort first float groupby int items last length list lower max min reject "
    "rejectattr reverse select selectattr sort string title trim unique upper wordcount"
)
"""Jinja's filters whose results are at most as large as their input."""
_METHODS = (
    "capitalize count endswith find get index items keys lower lstrip partition removeprefix removesuffix rfind "
    "rpartition rsplit rstrip split splitlines startswith strip title upper values"
)
"""Methods of texts, lists and mappings whose results are at most as large as their input."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Environment for expressions over a raw row; names are fields only."""

    intercepted_binops = frozenset(("*", "**", "%"))  # Jinja does not compute these when it compiles

    def __init__(self, **more: Any):
        super().__init__(undefined=jinja2.StrictUndefined)
        self.globals.clear()
        self.filters = {name: filters.FILTERS[name] for name in _FILTERS.split()}
        self.filters |= {"join": _join, "map": _map, "replace": _replace} | more

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `*`, `**` or `%` if the result is small."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% formats text, which is not allowed; join texts with ~")
        if operator == "**" and isinstance(left, int):
            _limit(left.bit_length() * right)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple):
                    _limit(size(value) * times)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method of `_METHODS`."""
        name = getattr(__obj, "__name__", "this call")
        if name not in _METHODS.split() or not isinstance(__obj.__self__, str | list | tuple | dict):
            raise SecurityError(f"{name} is not allowed; allowed are {_METHODS}, and filters such as join and replace")
        return super().call(__context, __obj, *args, **kwargs)


def size(value: Any) -> int:
    """Number of characters and items in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return 1 + sum(map(size, value))
    return 1


def _limit(number: float) -> None:
    if number > MOST:
        raise SecurityError(f"the expression would create a value larger than {MOST:,}")


def _join(values: Any, separator: str = "") -> str:
    """Texts of a list, joined by a separator."""
    texts = [*map(str, values)]
    _limit(len(texts) * len(separator))
    return separator.join(texts)


def _map(values: Any, attribute: str) -> list[Any]:
    """One field of each mapping in a list; Jinja's filter of this name can also enlarge each value."""
    return [value[attribute] for value in values]


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    """Text with a part replaced."""
    text = str(text)
    _limit(text.count(old) * (len(new) - len(old)))
    return text.replace(old, new, count)


def tagged(patch: str) -> str:
    """Write a patch on one line with tags, as haider2024's authors do.

    The hunk header and lines of only white space are dropped; other lines are stripped. The tags are `<add>` for +,
    `<del>` for -, and `<keep>` for other lines. A line that is only + or - becomes a tag alone.
    """
    tags = {"+": "<add>", "-": "<del>"}
    lines = (line for line in patch.split("\n")[1:] if line.strip())
    return "".join(tags.get(line[0], "<keep>") + line[1:].strip() for line in lines)


def tojson(value: Any) -> str:
    """Value as JSON; Jinja's filter of this name would escape it for HTML."""
    return orjson.dumps(value).decode()


def role_colon(messages: list[dict[str, str]]) -> list[Row]:
    """Chat as segments: `Role:` and content for each message.

    This follows the renderer of the same name in thinking-machines-lab/tinker-cookbook. Loss is on the last answer and
    on the `User:` after it.
    """
    segments = []
    for message in messages:
        header, content = f"{message['role'].capitalize()}:", f" {message['content']}\n\n"
        segments += [{"label": False, "text": header}, {"label": False, "text": content}]
    if messages[-1]["role"] == "assistant":
        segments[-1]["label"] = True
        segments.append({"label": True, "text": "User:"})
    return segments


def turns(messages: list[dict[str, str]], form: str) -> str:
    """Text of a chat: a form for each message, with {role} and {content}."""
    _limit(len(messages) * len(form))
    return "".join(
        _replace(_replace(form, "{role}", message["role"]), "{content}", message["content"]) for message in messages
    )


def dbgpt_schema(database: Mapping[str, Any]) -> str:
    """Schema in words, from a row of Spider's tables.json.

    This follows sql_data_process.py in eosphoros-ai/DB-GPT-Hub.
    """
    tables, columns = database["table_names_original"], database["column_names_original"]
    text = f"{database['db_id']} contains tables such as {', '.join(tables)}. "
    for number, table in enumerate(tables):
        names = [name for place, name in columns if place == number]
        text += f"Table {table} has columns such as {', '.join(names)}. "
        for key in database["primary_keys"]:
            if columns[key][0] == number:
                text += f"{columns[key][1]} is the primary key.\n"
    for key, target in database["foreign_keys"]:
        (place, name), (target_place, target_name) = columns[key], columns[target]
        text += f"The {name} of {tables[place]} is the foreign key of {target_name} of {tables[target_place]}.\n"
    return text


FILTERS = {"tagged": tagged, "tojson": tojson, "role_colon": role_colon, "turns": turns, "dbgpt_schema": dbgpt_schema}
_JINJA = Sandbox(**FILTERS)


class BadRow(Exception):
    """Raw row that cannot be prepared."""


class Expression:
    """Compiled expression.

    Args:
        name: name for messages.
        text: source text.

    Raises:
        ValueError: the text is not an expression, or names an unknown filter or test.
    """

    def __init__(self, name: str, text: str):
        self.label = name if text == name else f"{name} ({text:.60})"
        if len(text) > MOST_TEXT:
            raise ValueError(f"longer than {MOST_TEXT:,} characters; use a shorter expression")
        try:
            self._compiled = _JINJA.compile_expression(text, undefined_to_none=False)
        except jinja2.TemplateError as error:
            raise ValueError(f"{text!r}: {error.message} (put literal text in additional quotes)") from None
        except (RecursionError, SyntaxError, MemoryError):  # of Jinja's parser, and of Python's
            raise ValueError(f"{text:.60}: nested too deeply") from None

    def value(self, fields: Mapping[str, Any]) -> Any:
        """Evaluate the expression for a row's fields.

        Raises:
            BadRow: a field is missing, or the expression fails.
        """
        try:
            value = self._compiled(fields)
            if size(value) > MOST and size(value) > 10 * size(fields.get("row", "")):
                raise ValueError(f"the value has more than {MOST:,} characters, and is ten times as large as the row")
            if isinstance(value, jinja2.Undefined):
                str(value)  # raises the error that names the field
        except Exception as error:  # an expression can raise anything on an unexpected value
            raise BadRow(f"{self.label}: {error}") from None
        return value


def has_gap(value: Any) -> bool:
    """True if a value, or a value inside it, is null or missing."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return any(map(has_gap, value))
    return value is None or isinstance(value, jinja2.Undefined)


def constants(fields: Mapping[str, str]) -> dict[str, Any]:
    """Values of fields whose expressions use no field of the raw row."""
    values = {}
    for name, text in fields.items():
        if not meta.find_undeclared_variables(_JINJA.parse(f"{{{{ {text} }}}}")):
            values[name] = Expression(name, text).value({})
    return values


def _compiled(texts: Mapping[str, str]) -> dict[str, Expression]:
    return {name: Expression(name, text) for name, text in texts.items()}


class RowMaker:
    """Converter of raw rows to prepared rows.

    Args:
        fields: expressions for the prepared fields.
        filters: expressions that are true for rows to leave out, by reason; they can use prepared fields.
        extra_fields: expressions for additional fields, which can be null.
        order: expression for the number that rows are sorted by; it can use prepared fields.
        lookups: rows of further files, by name; all expressions can use them.
    """

    def __init__(
        self,
        fields: Mapping[str, str],
        filters: Mapping[str, str],
        extra_fields: Mapping[str, str],
        order: str,
        **lookups: Sequence[Row],
    ):
        self._fields = _compiled(fields)
        self._filters = _compiled(filters)
        self._extra_fields = _compiled(extra_fields)
        self._order = Expression("longest_first", order)
        self._lookups = lookups

    def make(self, raw: Row, file: str = "", position: int = 0) -> tuple[Row, str | None, Row, float]:
        """Prepare a row.

        Expressions can use the fields of the raw row, `row` (the complete raw row), `file` (the name of the raw file),
        `idx` (the row's position) and the lookups. `fields` can also use earlier prepared fields; `filters` and
        `order` can use all of them. If a raw and a prepared field have the same name, `fields` use the raw one;
        `filters` and `order` use the prepared one.

        Returns:
            The prepared row, the filter that leaves it out (None to keep it), extra fields, and sort value.

        Raises:
            BadRow: a field is missing, an expression fails, a prepared field contains null or is neither text nor a
                list or mapping, or the sort value is not a number.
        """
        raw_fields = {**self._lookups, "row": raw, "file": file, "idx": position} | raw
        row: Row = {}
        for name, expression in self._fields.items():
            row[name] = expression.value(row | raw_fields)
        all_fields = raw_fields | row
        for filter_name, expression in self._filters.items():
            if expression.value(all_fields):
                return row, filter_name, {}, 0
        for name, value in row.items():
            if not isinstance(value, str | list | tuple | dict) or has_gap(value):
                problem = f"{value!r:.60} is neither text nor a list or mapping of texts; filter such rows out"
                raise BadRow(f"{self._fields[name].label}: {problem}")
        length = self._order.value(all_fields)
        if not isinstance(length, int | float):
            raise BadRow(f"{self._order.label}: {length!r:.60} is not a number; use a number, such as a length")
        extra = {name: expression.value(raw_fields) for name, expression in self._extra_fields.items()}
        return row, None, extra, length


def _delimiter(header: str) -> str:
    """Delimiter of a file's columns, from its first line; a comma if there is one column."""
    sniffer = csv.Sniffer()
    sniffer.preferred = list(_DELIMITERS)
    with suppress(csv.Error):
        return sniffer.sniff(header, _DELIMITERS).delimiter
    return ","


def parquet_batches(path: Path) -> Iterator[Any]:
    """Batches of a Parquet file's rows, of pyarrow.

    Raises:
        UserError: the file is damaged, or expands to more than a thousand times its size.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        batches = file.iter_batches(100)
        while size < MOST_EXPANDED + 1000 * path.stat().st_size:
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
            size += batch.nbytes + 100 * len(batch)
        raise ArrowException("it expands to more than a thousand times its size; save it as JSON lines")
    except (ArrowException, OSError) as error:
        raise UserError(f"not a usable Parquet file: {error}", file=path) from None


class RawFile:
    """Raw file, or several files read as one.

    Attributes:
        path: current file.
        read: number of rows read so far.
    """

    def __init__(self, *paths: Path):
        self.paths, self.path = paths, paths[0]
        self.read = self._line = self._before = 0

    @property
    def where(self) -> str:
        """Place of the current row: its line, or its number in an array."""
        return f"{self.path}:{self._line}" if self._line else f"{self.path}: row {self.read - self._before}"

    def rows(self) -> Iterator[Row]:
        """Stream rows; only JSON arrays are loaded completely.

        Raises:
            UserError: a row is not a mapping, or the file is malformed.
        """
        self.read = 0
        for path in self.paths:
            self.path, self._line, self._before = path, 0, self.read
            with BufferedReader(reading(self.path).detach(), 1 << 18) as stream:
                for row in self._parse(stream):
                    self.read += 1
                    yield row

    def _parse(self, stream: "BufferedReader[Any]") -> Iterator[Row]:
        suffix = self.path.suffix.lower()
        if suffix in (".csv", ".tsv", ".txt"):
            return self._csv_rows(stream)
        if suffix == ".parquet":
            return chain.from_iterable(batch.to_pylist() for batch in parquet_batches(self.path))
        is_array = stream.peek(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        if suffix == ".json" and is_array:
            return self._array(stream)
        return json_rows(self._lines(stream), self.path, ())

    def _lines(self, stream: IO[bytes]) -> Iterator[bytes]:
        for self._line, line in enumerate(stream, start=1):
            yield line

    def _array(self, stream: IO[bytes]) -> Iterator[Row]:
        try:
            rows = parse_json(stream.read())
        except orjson.JSONDecodeError as error:
            raise UserError(f"not JSON: {error.msg}", file=self.path, line=error.lineno) from None
        if not all(isinstance(row, dict) for row in rows):
            raise UserError("not a JSON array of mappings", file=self.path)
        yield from rows

    def _csv_rows(self, stream: "BufferedReader[Any]") -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)
        header = stream.peek(1 << 16).partition(b"\n")[0].decode("utf-8-sig", "replace")
        texts = (line.decode("utf-8-sig") for line in self._lines(stream))
        reader = csv.DictReader(texts, delimiter=_delimiter(header), strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names) or "" in names:
                remedy = "give each field a name"
                raise UserError("a field's name is missing or occurs twice", file=self.path, line=1, remedy=remedy)
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{self.where}: the row does not have the {len(names)} fields named in line 1")
                yield row
        except UnicodeDecodeError:
            command = f"iconv -f WINDOWS-1252 -t UTF-8 {self.path.name} > utf8{self.path.suffix}"
            remedy = f"save it as UTF-8, or convert it, as in `{command}`"
            raise UserError("not UTF-8", file=self.path, line=self._line, remedy=remedy) from None
        except csv.Error as error:  # an open quotation mark ends only with the file
            problem = f"not CSV: {error}; {self.read - self._before:,} complete rows precede"
            raise UserError(problem, file=self.path, line=self._line) from None


def within(path: Path, names: Collection[str]) -> dict[str, Path]:
    """Raw files with some names at a path: the file itself, or files in the folder."""
    if path.is_dir():
        return {name: path / name for name in names if (path / name).is_file()}
    return {name: path for name in names if path.match(name)}


def find_files(raw: Iterable[Path], names: Collection[str]) -> dict[str, Path]:
    """Find raw files by name in the user's files and folders.

    Raises:
        UserError: a path does not exist, a path has no raw file, or two files have the same name.
    """
    raw_files: dict[str, Path] = {}
    for path in raw:
        if not path.exists():
            raise UserError("no such file", file=path)
        files = within(path, names)
        if not files:
            problem = "not a raw file of the study, or no folder with one"
            raise UserError(problem, file=path, remedy=f"expected {', '.join(names)}")
        for name, file in files.items():
            if name in raw_files:
                problem = f"{raw_files[name]} is also named {name}"
                raise UserError(problem, file=file, remedy="give only one of them")
            raw_files[name] = file
    return raw_files


def fetched_files(data: Data) -> list[Path]:
    """Raw files in the folder of `recipe data fetch`.

    Raises:
        UserError: a file is missing.
    """
    for name in data.raw_files:
        file = data.raw / name
        if not file.is_file():
            source = data.sources_of([name])[0]
            remedy = f"run {recipe_command('data', 'fetch', data.key)}"
            if data.sources[source].is_own:
                remedy = "copy it there"
            remedy += ", or give its folder to `recipe data prepare --study STUDY`"
            raise UserError("no such file", file=file, remedy=remedy)
    return [data.raw / name for name in data.raw_files]
