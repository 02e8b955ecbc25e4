"""Raw files, also inside folders and zips, and the rows in them."""

import csv
import gzip
import hashlib
import io
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path, PurePath
from typing import IO, Any

import orjson

from ..base.errors import UserError
from ..base.files import DAMAGED_ZIP, json_rows, loads
from .declaration import Data

BUFFER = 1 << 18  # bytes that are read at once
Row = dict[str, Any]


class RawFile:
    """A raw file.

    Attributes:
        label: its path in messages, with its name in a zip behind it.
        read: the number of rows that were read.
    """

    def __init__(self, path: Path, member: str | None = None):
        self.path = path
        self.member = member
        self.label = f"{path}:{member}" if member else str(path)
        self.read = self._line = 0

    @property
    def where(self) -> str:
        """The place of the row that was read last: its line, or its number in an array."""
        return f"{self.label}:{self._line}" if self._line else f"{self.label}: row {self.read}"

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with _errors(self.label), ExitStack() as stack:
            stream: IO[bytes] = stack.enter_context(self.path.open("rb"))
            if self.member:
                stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(stream)).open(self.member))
            yield stream

    @cached_property
    def checksum(self) -> tuple[str, int]:
        """Its SHA-256 and its bytes."""
        with self._opened() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()

    def rows(self) -> Iterator[Row]:
        """Its rows, as a stream; only an array of JSON is read whole.

        Raises:
            UserError: a row is not a mapping, or the file is damaged.
        """
        with self._opened() as stream, ExitStack() as stack:
            lines: Any = io.BufferedReader(stream, BUFFER)
            name = self.member or self.path.name
            if name.endswith(".gz"):
                lines = stack.enter_context(gzip.GzipFile(fileobj=lines))
            self.read = self._line = 0
            for row in self._parsed(PurePath(name.removesuffix(".gz")).suffix, lines):
                self.read += 1
                yield row

    def _parsed(self, suffix: str, stream: IO[bytes]) -> Iterator[Row]:
        if suffix == ".csv":
            yield from self._csv_rows(stream)
        elif suffix == ".json":
            yield from self._array(stream.read())
        else:
            yield from json_rows(self._lines(stream), self.label, ())

    def _lines(self, stream: Iterable[bytes]) -> Iterator[bytes]:
        for self._line, line in enumerate(stream, start=1):
            yield line

    def _array(self, content: bytes) -> Iterator[Row]:
        try:
            rows = loads(content)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{self.label}:{error.lineno}: not JSON: {error.msg}") from None
        if not isinstance(rows, list):
            raise UserError(f"{self.label}: not a JSON array of rows; a file with a row a line ends in .jsonl")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise UserError(f"{self.label}: row {number}: a row is a mapping of fields to values")
            yield row

    def _csv_rows(self, stream: Iterable[bytes]) -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(self._texts(stream), strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names) or "" in names:
                raise UserError(f"{self.label}:1: the first line names the fields, each once")
            for values in reader:
                if len(values) == len(names):
                    yield dict(zip(names, values, strict=True))
                elif values:  # a blank line has none
                    raise UserError(f"{self.where}: {len(values)} fields, but the first line names {len(names)}")
        except csv.Error as error:
            raise UserError(f"{self.where}: not CSV: {error}") from None

    def _texts(self, stream: Iterable[bytes]) -> Iterator[str]:
        for line in self._lines(stream):
            try:
                yield line.decode("utf-8-sig" if self._line == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{self.where}: not text in UTF-8") from None


@contextmanager
def _errors(label: str) -> Iterator[None]:
    """Report errors of compressed files, which show when one is opened or only while it is read."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{label}: no such file") from None
    except (*DAMAGED_ZIP, gzip.BadGzipFile) as error:
        raise UserError(f"{label}: damaged ({error}); fetch it again") from None
    except RuntimeError as error:  # encrypted, or packed by another method
        raise UserError(f"{label}: cannot be read: {error}") from None


def within(given: Path, names: Collection[str]) -> list[tuple[str, RawFile]]:
    """The raw files of some names at a path: the file itself, or those in a folder or zip.

    Raises:
        UserError: a zip does not exist or is damaged.
    """
    if given.is_dir():
        return [(name, RawFile(given / name)) for name in names if (given / name).is_file()]
    if given.suffix != ".zip":
        return [(name, RawFile(given)) for name in names if _is(given, name)]
    with _errors(str(given)), zipfile.ZipFile(given) as archive:
        members = archive.namelist()
    return [(name, RawFile(given, member)) for name in names for member in members if _is(PurePath(member), name)]


def _is(path: PurePath, name: str) -> bool:
    """Whether a path ends in a name, which can have folders."""
    parts = PurePath(name).parts
    return path.parts[-len(parts) :] == parts


def find(raw: Iterable[Path], names: Collection[str]) -> dict[str, RawFile]:
    """The raw files of some names, among files and in folders and zips that the user names.

    Raises:
        UserError: a path does not exist or has no such file, one is empty, or there are two of a name.
    """
    found: dict[str, RawFile] = {}
    for given in raw:
        if not given.exists():
            raise UserError(f"{given}: no such file")
        files = within(given, names)
        if not files:
            raise UserError(f"{given}: no raw file of the study; those are {', '.join(names)}")
        for name, file in files:
            if file.path.stat().st_size == 0:
                raise UserError(f"{file.path}: the file is empty")
            if name in found:
                raise UserError(f"{file.label}: a second file for {name}, after {found[name].label}")
            found[name] = file
    return found


def fetched(data: Data) -> list[Path]:
    """The raw files that `recipe data fetch` left.

    Raises:
        UserError: it left none.
    """
    files = [data.raw / name for name in data.raw_files]
    if missing := [file for file in files if not file.is_file()]:
        remedy = f"`recipe data fetch {data.key}` gets it, or name a folder that has it"
        raise UserError(f"{missing[0]}: no such file; {remedy}")
    return files
