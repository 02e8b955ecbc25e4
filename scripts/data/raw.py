"""Raw files: where they are, also inside folders and zips, and the rows in them."""

import csv
import gzip
import hashlib
import io
import re
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import IO, Any

import orjson

from ..base.errors import UserError
from ..base.files import DAMAGED_ZIP, json_rows, loads
from .declaration import SPLITS, Data

BUFFER = 1 << 18  # bytes that are read at once
Row = dict[str, Any]


class _Hashed(io.RawIOBase):
    """A stream that hashes and counts what is read of it."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self.digest.update(chunk)
        self.bytes += len(chunk)
        return len(chunk)


class RawFile:
    """A raw file. Once its rows are read `sha256`, `bytes` and `read`, how many they are, are known.

    Attributes:
        label: its path in messages, with its name in a zip behind it.
    """

    def __init__(self, path: Path, member: str | None = None):
        self.path = path
        self.member = member
        self.label = f"{path}:{member}" if member else str(path)
        self._line = 0
        self.sha256 = ""
        self.bytes = self.read = 0

    @property
    def where(self) -> str:
        """The place of the row that was read last, for messages: its line, or its number in an array."""
        return f"{self.label}:{self._line}" if self._line else f"{self.label}: row {self.read}"

    def rows(self) -> Iterator[Row]:
        """Its rows, as a stream; only an array of JSON is read whole.

        Raises:
            UserError: a row is none, or the file is damaged.
        """
        with ExitStack() as stack, self._errors():
            stream: IO[bytes] = stack.enter_context(self.path.open("rb"))
            if self.member:
                stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(stream)).open(self.member))
            hashed = _Hashed(stream)
            lines: Any = io.BufferedReader(hashed, BUFFER)
            name = self.member or self.path.name
            if name.endswith(".gz"):
                lines = stack.enter_context(gzip.GzipFile(fileobj=lines))
            self.read = self._line = 0
            for row in self._parsed(PurePath(name.removesuffix(".gz")).suffix, lines):
                self.read += 1
                yield row
            self.sha256, self.bytes = hashed.digest.hexdigest(), hashed.bytes

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
    def _errors(self) -> Iterator[None]:
        """Report what can be wrong with what is compressed, which shows when it is opened or only while it is read."""
        try:
            yield
        except (*DAMAGED_ZIP, gzip.BadGzipFile) as error:
            raise UserError(f"{self.label}: damaged ({error}); fetch it again") from None
        except RuntimeError as error:  # encrypted, or packed by another method
            raise UserError(f"{self.label}: cannot be read: {error}") from None


def is_there(given: Path, names: Collection[str]) -> bool:
    """Whether a file is a raw file of one of some names, or a folder or zip holds one."""
    if given.is_dir():
        return any((given / name).is_file() for name in names)
    inside = [given.name]
    if given.suffix == ".zip" and zipfile.is_zipfile(given):
        with zipfile.ZipFile(given) as archive:
            inside = [PurePath(name).name for name in archive.namelist()]
    return any(PurePath(name).name in inside for name in names)


def find(raw: Iterable[Path], names: Collection[str]) -> dict[str, RawFile]:
    """The raw files of some names, among files and in folders and zips that the user names.

    A file may also have another name, if that has the word train, valid or test and one of the names too.

    Raises:
        UserError: a file does not exist, is empty or has another name, or there are two of a name.
    """
    found: dict[str, RawFile] = {}
    none = f"holds no {_or(names)}"
    for given in raw:
        if given.is_dir():
            files = [RawFile(given / name) for name in names if (given / name).is_file()]
            if not files:
                raise UserError(f"{given}: {none}; name the folder or the files that are to be prepared")
        elif given.suffix == ".zip":
            files = _in_zip(given, names)
        else:
            files = [RawFile(given)]
        for file in files:
            if not file.path.is_file():
                raise UserError(f"{file.path}: no such file")
            if file.path.stat().st_size == 0:
                raise UserError(f"{file.path}: the file is empty")
            name = _named(file, names)
            if name in found:
                raise UserError(f"{file.label}: a second file for {name}, after {found[name].label}")
            found[name] = file
    return found


def _in_zip(file: Path, names: Collection[str]) -> list[RawFile]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if PurePath(name).name in names]
    except DAMAGED_ZIP as error:
        raise UserError(f"{file}: the zip is damaged ({error}); fetch it again") from None
    if not members:
        raise UserError(f"{file}: holds no {_or(names)}")
    return [RawFile(file, member) for member in members]


def _named(file: RawFile, names: Collection[str]) -> str:
    """The name of a study's raw file that is meant by one."""
    path = PurePath(file.member or file.path)
    if whole := [name for name in names if PurePath(name).parts == path.parts[-len(PurePath(name).parts) :]]:
        return whole[0]
    words = set(re.findall("|".join(SPLITS), path.name))
    alike = [name for name in names if words & set(re.findall("|".join(SPLITS), name))]
    if len(alike) == 1:
        return alike[0]
    raise UserError(f"{file.label}: the study's raw files are {', '.join(names)}; give it the name of that which it is")


def _or(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


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
