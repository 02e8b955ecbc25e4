"""Files that are never seen half-written, what is in them, and the room on their disks."""

import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from .errors import UserError

Row = dict[str, Any]


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that replaces `file` when the block ends without an error.

    Otherwise it is removed. Its folder is made. What is no regular file, such as /dev/stdout, is written to as it is.
    """
    if file.exists() and not file.is_file():
        with naming(file), file.open("wb") as stream:
            yield stream
        return
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")  # containers can share a folder and process ids
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as stream:
                yield stream
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def opened(file: Path, mode: str) -> IO[bytes]:
    """Open a file that is no symbolic link.

    Another user's run folder could point to files of this user.

    Raises:
        UserError: it is one.
    """
    try:
        return open(file, mode, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{file}: a symbolic link, which is not followed; put a file in its place") from None
        raise


def clear_parts(file: Path) -> None:
    """Remove what killed processes left of `file`; only while holding the lock of its folder."""
    for part in file.parent.glob(f".{glob.escape(file.name)}.*.part"):
        part.unlink()


def json_rows(lines: Iterable[bytes], where: Path | str, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are skipped.

    Args:
        lines: its lines.
        where: its name in messages.
        fields: the text fields that every row must have.

    Raises:
        UserError: a line is not such a row.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{where}:{number}: not a JSON row: {error.msg}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}:{number}: not a JSON row: a row is a mapping of fields to values")
        for name in fields:
            if not isinstance(row.get(name), str):
                raise UserError(f"{where}:{number}: a row needs the text field {name}")
        yield row


def read_rows(file: Path, fields: Sequence[str] = ("reference", "prediction"), hint: str = "") -> list[Row]:
    """The rows of a JSONL file with some text fields, whatever else they have.

    Raises:
        UserError: the file is missing, which `hint` helps with, or empty, or a row lacks a field.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file{hint}")
    with file.open("rb") as lines:
        rows = list(json_rows(lines, file, fields))
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Replace the content of `file` by rows, a JSON line each."""
    with replacing(file) as stream:
        stream.writelines(orjson.dumps(row) + b"\n" for row in rows)


def read_json(file: Path) -> Row:
    """The mapping in a JSON file; empty without one."""
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(file: Path, value: Any) -> None:
    """Replace the content of `file` by a value as indented JSON."""
    with replacing(file) as stream:
        stream.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def tensor_shapes(file: Path) -> dict[str, list[int]] | None:
    """Shapes of the tensors in a safetensors file, by name; None if it is broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.offset_keys()}
    except (OSError, SafetensorError):
        return None


def embedding_rows(adapter: Path) -> int | None:
    """The rows of the embedding in an adapter's file; None if it has none."""
    shapes = tensor_shapes(adapter) or {}
    return next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)


def write_atomically(file: Path, text: str) -> None:
    """Replace the content of `file` by `text`."""
    with replacing(file) as stream:
        stream.write(text.encode())


def append_line(file: Path, line: bytes) -> None:
    """Append a line; an unfinished line of a killed process stays, for readers to skip."""
    with naming(file), opened(file, "a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                line = b"\n" + line
        stream.write(line + b"\n")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last by a limit on the size of files
RESERVED_BYTES = 1 << 16  # bytes, enough for a run's record

_SAID = r"No space left on device|Disk quota exceeded|os error 28|PytorchStreamWriter failed writing"
_NO_ROOM = re.compile(rf"(?:{_SAID})(?:[^\n']*: '(/[^'\n]+)')?")  # as Python, safetensors' Rust and torch say it


def free_bytes(path: Path) -> int:
    """The bytes that this user can still write where a path lies, or would lie; without end where its file system, as
    /proc, has no size."""
    usage = shutil.disk_usage(next(parent for parent in (path, *path.absolute().parents) if parent.exists()))
    return usage.free if usage.total else sys.maxsize


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add a path to the block's disk errors, which the error of a full disk lacks.

    Raises:
        OSError: with the path, also where a library raised an error of its own kind for a full disk.
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
    """Reserve some room in a folder for records that follow the block.

    Raises:
        OSError: of the folder, which has not even that room.
    """
    with ExitStack() as stack:
        with naming(folder):
            # without a name, so that nobody who is killed leaves it
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            file.write(os.urandom(RESERVED_BYTES))  # zeros would take no room on some disks
            file.flush()
            os.fsync(file.fileno())  # a disk elsewhere says only then that it is full
        yield


def where_full(log: str, folders: list[Path]) -> Path | None:
    """Place where a process ran out of room: the file in its log, else the fullest of some folders; None where it
    did not. The log itself may have had no room for saying so.

    Args:
        log: the last lines of what it said: earlier ones can tell of what it could do without.
        folders: those that it writes to, where `reserved` still holds room, or not.
    """
    said = _NO_ROOM.search(log)
    if said and said[1]:
        return Path(said[1])
    fullest = min(folders, key=free_bytes)
    return fullest if said or free_bytes(fullest) < RESERVED_BYTES else None
