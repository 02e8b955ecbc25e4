"""Files: atomic writing, reading of rows, and disk space."""

import codecs
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import orjson

from .errors import UserError
from .paths import absence

JsonObject = dict[str, Any]
Row = JsonObject
_MOST_LEVELS = 100  # of JSON; rows and records have fewer than ten
MOST_BYTES = 1 << 30
"""Size of the largest file that is read whole: another user's could fill the memory."""


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file; it replaces `file` if the block ends without an error.

    After an error, the temporary file is removed; the next call removes those of killed processes. The folder is
    created if necessary. Special files such as /dev/stdout are written directly.
    """
    if file.exists() and not file.is_file():
        with naming(file), file.open("wb") as stream:
            yield stream
        return
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(file)
        with _locked_part(file) as part:
            try:
                with part.open("wb") as stream:
                    yield stream
                part.replace(file)
            except BaseException:
                part.unlink(missing_ok=True)
                raise


@contextmanager
def _locked_part(file: Path) -> Iterator[Path]:
    """Temporary file beside a file, locked so that `_remove_abandoned` of other processes leaves it."""
    while True:
        part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")  # containers can share folders and pids
        try:
            stream = part.open("xb")
        except OSError as error:
            error.filename = str(file)  # which the user knows
            raise
        with stream as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else another process has removed it before it was locked
                yield part
                return


def _remove_abandoned(file: Path) -> None:
    """Remove temporary files that killed processes left beside a file."""
    for part in parts_of(file):
        with suppress(OSError), reading(part) as stream:  # OSError: a process that writes it holds the lock
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def parts_of(file: Path) -> list[Path]:
    """Temporary files of `replacing` beside a file, being written or left by killed processes."""
    return [*file.parent.glob(f".{glob.escape(file.name)}.*.part")]


def opened(file: Path, mode: str) -> IO[bytes]:
    """Open a regular file, but not through a symbolic link.

    A link in another user's run folder could point to this user's files.

    Raises:
        UserError: the file is a symbolic link, or not a regular file.
    """
    try:
        return open(file, mode, opener=partial(_open_regular, links=os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError("symbolic links are not followed", file=file, remedy="replace it with a file") from None
        if error.errno in (errno.ENXIO, errno.EINVAL):  # ENXIO: a FIFO that nobody reads, or a socket
            raise UserError("not a regular file", file=file, remedy="remove it") from None
        raise


def reading(file: Path, most: int = sys.maxsize) -> BufferedReader:
    """Open a regular file of at most `most` bytes for reading.

    Raises:
        OSError: the file cannot be read, is larger, or is not regular. A FIFO would block, and a device might not end.
    """
    stream = open(file, "rb", opener=_open_regular)  # noqa: SIM115 (the caller closes it)
    if os.fstat(stream.fileno()).st_size > most:
        stream.close()
        raise OSError(errno.EFBIG, f"larger than {most / (1 << 20):,.0f} MiB", str(file))
    return stream


def _open_regular(path: str, flags: int, links: int = 0) -> int:
    descriptor = os.open(path, flags | links | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


def read_bytes(file: Path) -> bytes:
    """Content of a regular file of at most MOST_BYTES.

    Raises:
        OSError: see `reading`.
    """
    with reading(file, MOST_BYTES) as stream:
        return stream.read()


def parse_json(text: bytes) -> Any:
    """Value of a JSON text; orjson reads 1,024 levels, but writes only 254.

    Raises:
        orjson.JSONDecodeError: the text is not JSON, or has more levels than `_MOST_LEVELS`.
    """
    text = text.removeprefix(codecs.BOM_UTF8)
    value = orjson.loads(text)
    if text.count(b"[") + text.count(b"{") > _MOST_LEVELS and _is_deeper(value, _MOST_LEVELS):
        raise orjson.JSONDecodeError(f"more than {_MOST_LEVELS} nested levels", "", 0)
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """True if a value has more nested levels than `levels`."""
    if not isinstance(value, list | dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def json_rows(lines: Iterable[bytes], file: Path | str, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a JSONL file; blank lines are skipped.

    Args:
        lines: the lines of the file.
        file: the name of the file in messages.
        fields: the text fields that every row must have.

    Raises:
        UserError: a line is not a JSON mapping, or lacks a field.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"not JSON: {error.msg}", file=file, line=number) from None
        if not isinstance(row, dict):
            raise UserError("not a JSON mapping of fields to values", file=file, line=number)
        for name in fields:
            if not isinstance(row.get(name), str):
                raise UserError(f"the text field {name} is missing", file=file, line=number)
        yield row


def read_rows(file: Path, fields: Sequence[str] = (), hint: str = "") -> list[Row]:
    """Read the rows of a JSONL file; every row must have the given text fields.

    Raises:
        UserError: the file is missing (the message ends with `hint`), too large or empty, or a row lacks a field.
    """
    if not file.is_file():
        raise UserError(absence(file, hint), file=file)
    try:
        with reading(file, MOST_BYTES) as lines:
            rows = list(json_rows(lines, file, fields))
    except OSError as error:
        raise UserError(str(error.strerror), file=file) from None
    if not rows:
        raise UserError("no rows", file=file)
    return rows


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Replace the content of `file` with rows, one JSON line each."""
    with replacing(file) as stream:
        stream.writelines(json_lines(rows))


def json_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    """Lines of a JSONL file with rows."""
    return (orjson.dumps(row) + b"\n" for row in rows)


def read_json(file: Path) -> Row:
    """Read the mapping in a JSON file; empty if the file has no mapping."""
    try:
        content = parse_json(read_bytes(file))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(file: Path, value: Any) -> None:
    """Replace the content of `file` with a value as indented JSON; it can contain numbers of study.yaml."""
    write_atomically(file, orjson.dumps(value, float, orjson.OPT_INDENT_2).decode() + "\n")


def tensor_shapes(file: Path) -> dict[str, list[int]] | None:
    """Shapes of the tensors in a safetensors file; None if the file is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.offset_keys()}
    except (OSError, SafetensorError):
        return None


def embedding_rows(adapter: Path) -> int | None:
    """Number of embedding rows in an adapter's file; None without an embedding."""
    shapes = tensor_shapes(adapter) or {}
    return next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)


def write_atomically(file: Path, text: str) -> None:
    """Replace the content of `file` with `text`."""
    with replacing(file) as stream:
        stream.write(text.encode())


def append_line(file: Path, line: bytes) -> None:
    """Append a line; first end the unfinished line of a killed process, if any."""
    with naming(file), opened(file, "a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                line = b"\n" + line
        stream.write(line + b"\n")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with reading(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(value: Any) -> str:
    """The SHA-256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: the file exceeds a size limit
RESERVED_BYTES = 1 << 16  # bytes, enough for a run's record

_SAID = r"No space left on device|Disk quota exceeded|os error 28|PytorchStreamWriter failed writing"
_NO_ROOM = re.compile(rf"(?:{_SAID})(?:[^\n']*: '(/[^'\n]+)')?")  # messages of Python, safetensors and torch


def free_bytes(path: Path) -> int:
    """Number of free bytes for this user on the disk of a path.

    The path need not exist. Returns sys.maxsize for file systems without a size, such as /proc.
    """
    usage = shutil.disk_usage(next(parent for parent in (path, *path.absolute().parents) if parent.exists()))
    return usage.free if usage.total else sys.maxsize


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a path to disk errors raised in the block, if they have none.

    Raises:
        OSError: the disk error with its path. A library's own error for a full disk becomes an OSError too.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (*DISK_FULL, errno.EIO):
            error.filename = error.filename or str(path)
        raise
    except Exception as error:
        if _NO_ROOM.search(str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Reserve disk space in a folder during the block, for records written after it.

    Raises:
        OSError: the folder lacks the space.
    """
    with tempfile.TemporaryFile(dir=folder) as file:  # unnamed, so that a killed process leaves no file behind
        with naming(folder):
            file.write(os.urandom(RESERVED_BYTES))  # zeros would take no space on some disks
            file.flush()
            os.fsync(file.fileno())  # a network disk reports a full disk only here
        yield


def where_full(log: str, folders: list[Path]) -> Path | None:
    """Path at which a process ran out of disk space; None if it did not.

    The path is the file that the log names. If the log has the error without a file, the path is the folder with the
    least free space. A full disk can also keep the error out of the log. Therefore the folder is also returned if the
    log has no error but almost no space is free.

    Args:
        log: the last lines of the process's log; earlier lines can report errors that the process survived.
        folders: the folders that the process writes to.
    """
    said = _NO_ROOM.search(log)
    if said and said[1]:
        return Path(said[1])
    fullest = min(folders, key=free_bytes)
    return fullest if said or free_bytes(fullest) < RESERVED_BYTES else None
