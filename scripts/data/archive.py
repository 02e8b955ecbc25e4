"""Takes the wanted files out of a zip, after it has verified all of them."""

import stat
import zipfile
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath
from typing import Any

from ..base.files import Output
from ..base.progress import Bar
from .declaration import SourceFile
from .download import CHUNK, check_space

FileRow = dict[str, Any]
_MOST_PACKED = 200  # times that a file is larger than in a zip; JSON with diffs is some 6 times larger


class Rejected(Exception):
    """What was fetched can be read, but its content is not what the study says."""


def row_of(name: str, size: int, digest: str, known: SourceFile, exact: bool = True) -> FileRow:
    """What is to be said of a file that was fetched: `file`, `bytes`, `sha256`, and `verified`, which is None if the
    study has no checksum.

    Args:
        exact: whether the study's number of bytes is that of this file.

    Raises:
        Rejected: the file is not the study's.
    """
    for key, expected, found in (("bytes", known.bytes if exact else None, size), ("sha256", known.sha256, digest)):
        if expected not in (None, found):
            raise Rejected(f"{name} is not the study's: {key} {expected} expected, {found} found")
    return {"file": name, "bytes": size, "sha256": digest, "verified": True if known.sha256 else None}


def _members(archive: zipfile.ZipFile, wanted: dict[str, SourceFile]) -> dict[str, zipfile.ZipInfo]:
    """The wanted files in an archive, by their names without folders."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        if member.header_offset < 0:  # with which zipfile would fail as if the disk had
            raise zipfile.BadZipFile(f"{member.filename!r} begins before the file")
        path = PureWindowsPath(member.filename)  # understands both kinds of slashes, and drives
        if path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise Rejected(
                f"{member.filename!r} in it is a link or leads out of the folder, so none of it is extracted"
            )
        if path.name not in wanted or member.is_dir():
            continue
        if path.name in members:
            raise Rejected(f"{path.name} is in it twice: {members[path.name].filename}, {member.filename}")
        members[path.name] = member
    for name, member in members.items():
        row_of(name, member.file_size, "", SourceFile(bytes=wanted[name].bytes))
        if member.file_size > _MOST_PACKED * max(member.compress_size, 1):
            packed = f"{member.file_size:,} bytes packed into {member.compress_size:,}"
            raise Rejected(f"{name} in it has {packed}, which no text can be, so none of it is extracted")
    if missing := [name for name in wanted if name not in members]:
        raise Rejected(f"{', '.join(missing)}: not in it")
    return members


def extract(stack: ExitStack, file: Path, wanted: dict[str, SourceFile], out: Path) -> list[FileRow]:
    """Verify the wanted files of a zip; they take their places in a folder when the stack is left without an error.

    Raises:
        Rejected: the archive or a file in it is not the study's.
    """
    rows = []
    with zipfile.ZipFile(file) as archive:
        members = _members(archive, wanted)
        check_space(out, sum(member.file_size for member in members.values()), "extracting")
        for name, known in wanted.items():
            size = members[name].file_size
            output = Output(stack, out / name)
            with archive.open(members[name]) as stream, Bar(f"{name}, MiB", size >> 20) as bar:
                while chunk := stream.read(CHUNK):
                    output.write(chunk)
                    bar.update(output.bytes >> 20)
            output.stream.flush()  # a full disk shows here, before any file is put in place
            if output.bytes != size:
                raise zipfile.BadZipFile(f"{name} is shorter than it says")
            rows.append(row_of(f"{name}", output.bytes, output.sha256(), known))
    return rows
