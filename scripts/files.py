"""Writing files so that nobody ever sees half of one, and telling what is in them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

CHUNK = 1 << 20


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `file` when the block ends well.

    Otherwise it is gone, and so are the folders that were made for it.
    """
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that meanwhile holds something else stays
            for folder in made:
                folder.rmdir()
        raise


def write_atomically(file: Path, text: str) -> None:
    """Put `text` in the place of whatever `file` held."""
    with replacing(file) as stream:
        stream.write(text.encode())


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
