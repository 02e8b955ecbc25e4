"""Downloads a data set's files from where they are published, verifies them, and puts them in place together."""

import re
import shutil
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import requests

from .. import __version__
from ..base.errors import UserError, WorkFailed
from ..base.files import DAMAGED_ZIP, Output, read_json, sha256, write_json
from ..base.locks import held
from ..base.machine import now
from ..base.progress import Bar, say
from .study import Data, SourceFile

RECORD = "fetched.json"
TIMEOUT = (15, 60)  # seconds: to connect, and without a byte
PAUSES = (2, 5, 15, 30, 60)  # seconds before each further try
CHUNK = 1 << 18  # bytes; at most this many are lost when a connection breaks


class _Rejected(Exception):
    """The archive can be read, but its content is not what the study says."""


def fetch(data: Data, out: Path, source: str | None = None) -> list[dict[str, Any]]:
    """Put the data set's files into a folder, unless they are there, and record in fetched.json what they are.

    An interrupted download stays as <archive>.part, from which the next call resumes. An archive that is not what the
    study says becomes <archive>.rejected. No file is replaced before all are verified.

    Args:
        data: the study's data; its `url` is where the archive is.
        out: the folder to write to.
        source: another address of the archive, or the path of a copy of it, which is only read.

    Returns:
        A row for each file: `file`, `bytes`, `sha256`, and `verified`, which is None if the study has no checksum.

    Raises:
        UserError: there is no such source, too little space, or the archive is damaged or another one.
        WorkFailed: the server cannot be reached, fails, or breaks off too often, or the disk is full.
    """
    source = data.url if source is None else source
    by_http = bool(re.match("https?://", source, re.IGNORECASE))
    if not by_http and not Path(source).is_file():
        raise UserError(f"{_public(source)}: no such file, nor an address that begins with http:// or https://")
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".fetch.lock", "another fetch is running"), _disk_errors(out):
        if rows := _present(data, out):
            say(f"{out}: all files are there, as recorded in {RECORD}; nothing is fetched")
            return rows
        part = _download(data, source, out) if by_http else None
        archive = part.file if part else Path(source)
        with _archive_errors(archive, part):
            rows = _extract(data, archive, out)
        write_json(
            out / RECORD,
            {
                "made_by": f"qlora-recipes {__version__}",
                "source": _public(source) if part else str(archive.resolve()),
                "time": now(),
                "archive": {"bytes": archive.stat().st_size, "sha256": sha256(archive)},
                "files": [row | {"mtime_ns": (out / row["file"]).stat().st_mtime_ns} for row in rows],
            },
        )
        if part:
            part.remove()
        return rows


def _public(url: str) -> str:
    """A URL without name, password and query, any of which can be secret; a path is unchanged."""
    return re.sub(r"(://)([^/?#]*@)?([^?#]*).*", r"\1\3", url)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Name the folder in a disk error that names no file, as one from a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise WorkFailed(f"{out}: {error.strerror}; what is downloaded stays; run it again to resume") from None


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "make room, or name another folder with --out"
        )


def _row(name: str, size: int, digest: str, known: SourceFile) -> dict[str, Any]:
    return {"file": name, "bytes": size, "sha256": digest, "verified": True if known.sha256 == digest else None}


def _present(data: Data, out: Path) -> list[dict[str, Any]]:
    """The rows of the files if all are there, as fetched.json records and the study wants them; else none."""
    recorded = {was["file"]: was for was in read_json(out / RECORD).get("files", [])}
    rows = []
    for name, known in data.files.items():
        file = out / name
        was = recorded.get(name)
        if (
            was
            and known.sha256 in (None, was["sha256"])
            and file.is_file()
            and file.stat().st_size == was["bytes"]
            and (file.stat().st_mtime_ns == was["mtime_ns"] or sha256(file) == was["sha256"])
        ):
            rows.append(_row(name, was["bytes"], was["sha256"], known))
        elif was or file.exists():
            say(f"{file}: not as recorded in {RECORD}; it is fetched again")
    return rows if len(rows) == len(data.files) else []


class _Part:
    """What is downloaded of a file, and beside it, as JSON, the address and version of that file."""

    def __init__(self, file: Path, url: str):
        self.file = file
        self._url = url
        self._about = file.with_name(f"{file.name}.json")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def resumable(self) -> dict[str, Any]:
        """The whole file's `version` and `bytes`; empty if the download cannot be resumed."""
        about = read_json(self._about)
        return about if self.size and about.get("url") == self._url and about.get("version") else {}

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def receive(self, response: requests.Response, expected: int, bar: Bar) -> str:
        """Append what a server sends; why the file is not whole yet, or nothing if it is.

        Args:
            expected: about how many bytes the whole file has, where the server does not say.
        """
        about = self.resumable()
        etag = response.headers.get("ETag", "W/")
        version = response.headers.get("Last-Modified") if etag.startswith("W/") else etag  # If-Range takes no weak one
        rest = rf"bytes {self.size}-\d+/{about.get('bytes') or '.+'}"
        if response.status_code == 200:
            if self.size:
                say(f"{self.file}: starting over; the server has another file now, or cannot send a part of it")
            about = {"url": self._url, "version": version, "bytes": int(response.headers.get("Content-Length", 0))}
            self.remove()  # before the new version is recorded, which would else seem to be that of the old bytes
            write_json(self._about, about)
        elif (
            not about
            or not re.fullmatch(rest, response.headers.get("Content-Range", ""))
            or version not in (None, about["version"])
        ):
            self.remove()
            return "the file on the server has changed"
        total = about["bytes"]
        _check_space(self.file.parent, (total or expected) - self.size, "the download")
        with self.file.open("ab") as stream:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                bar.update(stream.tell() >> 20, total >> 20)
        return "the connection broke off" if total and self.size != total else ""


def _download(data: Data, url: str, out: Path) -> _Part:
    """The whole archive, resumed from what an earlier call downloaded, if that is of the same file."""
    shown = _public(url)
    part = _Part(out / f"{data.archive}.part", shown)
    by_hand = (
        f"download {_public(data.url)} (its page: {data.source}) on another machine, copy it here, "
        f"and run `recipe data fetch {data.key} --from FILE`"
    )
    problem = ""
    reached = False
    with Bar(f"{data.archive}, MiB") as bar:
        for pause in (0, *PAUSES):
            if problem:
                say(f"{shown}: {problem}; next try in {pause} s")
                time.sleep(pause)
            headers = {"Accept-Encoding": "identity"}  # so that lengths and ranges are the file's own
            if about := part.resumable():
                if part.size == about["bytes"]:
                    return part
                headers |= {"Range": f"bytes={part.size}-", "If-Range": about["version"]}
            try:
                with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                    reached = True
                    if response.status_code in (200, 206, 416):
                        problem = part.receive(response, data.archive_bytes, bar)
                    else:
                        problem = f"the server answers {response.status_code} {response.reason}"
                        if response.status_code != 429 and response.status_code < 500:
                            raise UserError(f"{shown}: {problem}; name another address with --from, or {by_hand}")
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"the connection failed: {_cause(error)}"
                if not reached:
                    raise WorkFailed(f"{shown}: {problem}; {by_hand}") from None
            except requests.RequestException as error:  # whose text can show a password
                raise UserError(f"{shown}: not a usable address ({type(error).__name__}); {by_hand}") from None
            if not problem:
                return part
    raise WorkFailed(
        f"{shown}: {problem}, at the last of {len(PAUSES) + 1} tries; run it again to resume from "
        f"{part.size if part.resumable() else 0:,} bytes, or {by_hand}"
    )


def _cause(error: BaseException) -> str:
    """The cause of an error from requests, whose own text is long and repeats the address."""
    while error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def _archive_errors(archive: Path, part: _Part | None) -> Iterator[None]:
    """Report what is wrong with an archive; one that was downloaded is removed or, if it can be read, set aside."""
    try:
        yield
    except DAMAGED_ZIP as error:
        if part:
            part.remove()
        remedy = "it is removed; fetch it again" if part else "download it again"
        raise UserError(f"{archive}: not a zip, or a damaged one ({error}); {remedy}") from None
    except (_Rejected, RuntimeError) as error:  # zipfile's for what is encrypted, or packed by another method
        remedy = ""
        if part:
            remedy = f"; it is now {part.file.replace(part.file.with_suffix('.rejected'))}; the next fetch starts over"
            part.remove()
        raise UserError(f"{archive}: {error}{remedy}") from None


def _members(archive: zipfile.ZipFile, data: Data) -> dict[str, zipfile.ZipInfo]:
    """The wanted files in an archive, by their names without folders."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        if member.header_offset < 0:  # with which zipfile would fail as if the disk had
            raise zipfile.BadZipFile(f"{member.filename!r} begins before the file")
        path = PureWindowsPath(member.filename)  # understands both kinds of slashes, and drives
        if path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise _Rejected(
                f"{member.filename!r} in it is a link or leads out of the folder, so none of it is extracted"
            )
        if path.name not in data.files or member.is_dir():
            continue
        if path.name in members:
            raise _Rejected(f"{path.name} is in it twice: {members[path.name].filename}, {member.filename}")
        members[path.name] = member
    if missing := [name for name in data.files if name not in members]:
        raise _Rejected(f"{', '.join(missing)}: not in it")
    return members


def _extract(data: Data, file: Path, out: Path) -> list[dict[str, Any]]:
    """Put the wanted files of an archive in place, after all of them were verified."""
    rows = []
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(file))
        members = _members(archive, data)
        _check_space(out, sum(member.file_size for member in members.values()), "extracting")
        for name, known in data.files.items():
            size = members[name].file_size
            output = Output(stack, out / name)
            with archive.open(members[name]) as stream, Bar(f"{name}, MiB", size >> 20) as bar:
                while chunk := stream.read(CHUNK):
                    output.write(chunk)
                    bar.update(output.bytes >> 20)
            output.stream.flush()  # a full disk shows here, before any file is put in place
            row = _row(name, output.bytes, output.sha256(), known)
            if output.bytes != size:
                raise zipfile.BadZipFile(f"{name} is shorter than it says")
            for key, expected in (("bytes", known.bytes), ("sha256", known.sha256)):
                if expected not in (None, row[key]):
                    raise _Rejected(f"{name} in it is not the study's: {key} {expected} expected, {row[key]} found")
            rows.append(row)
    return rows
