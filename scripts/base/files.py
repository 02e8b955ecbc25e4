"""Writing files so that nobody ever sees half of one, and telling what is in them."""

import glob
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import orjson

from .errors import UserError


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, where need be; if the block fails, those made are removed, unless in use."""
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a folder that meanwhile holds something else stays
            for above in made:
                above.rmdir()
        raise


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `file` when the block ends well.

    Otherwise it is gone, and so are the folders that were made for it.
    """
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")  # containers can share a folder and process ids
    with making(file.parent):
        try:
            with part.open("xb") as stream:
                yield stream
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def clear_parts(file: Path) -> None:
    """Remove what killed processes left of a file that they were to replace; for who holds the lock of its folder."""
    for part in file.parent.glob(f".{glob.escape(file.name)}.*.part"):
        part.unlink()


def json_rows(lines: Iterable[bytes], where: Path | str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; blank lines are passed over.

    Args:
        lines: its lines.
        where: what messages call it.
        fields: the fields that every row must have, as text.

    Raises:
        UserError: a line is no such row.
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


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Put rows, a JSON line each, in the place of whatever `file` held."""
    with replacing(file) as stream:
        stream.writelines(orjson.dumps(row) + b"\n" for row in rows)


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is no such file, or it holds something else."""
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of each of its tensors by name, and the byte at which they begin.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = orjson.loads(stream.read(min(length, file.stat().st_size)))
    if not isinstance(header, dict):
        raise ValueError(f"{file}: its header is no mapping")
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}, 8 + length


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file by name; none where it cannot be read."""
    try:
        return {name: tensor["shape"] for name, tensor in safetensors_header(file)[0].items()}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def embedding_rows(adapter: Path) -> int | None:
    """The rows of the embedding that an adapter's file brings with it; None where it has none."""
    shapes = tensor_shapes(adapter)
    return next((shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)


def write_atomically(file: Path, text: str) -> None:
    """Put `text` in the place of whatever `file` held."""
    with replacing(file) as stream:
        stream.write(text.encode())


def append_line(file: Path, line: bytes) -> None:
    """Add a line to a file. One that a killed process left unfinished stays a line of its own, for readers to skip."""
    with file.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                line = b"\n" + line
        stream.write(line + b"\n")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
