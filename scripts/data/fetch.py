"""A data set's files from where they are published: downloaded, verified, and put in place together."""

import hashlib
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import orjson
import requests

from .. import __version__
from ..base.errors import UserError, WorkFailed
from ..base.files import clear_parts, read_json, replacing, sha256, write_atomically
from ..base.locks import held
from ..base.machine import now
from ..base.progress import Bar, say
from .study import Data, SourceFile

RECORD = "fetched.json"
TIMEOUT = (15, 60)  # seconds: to connect, and without a byte
PAUSES = (2, 5, 15, 30, 60)  # seconds before each further try
CHUNK = 1 << 18  # bytes; at most so many are lost when a connection breaks off


class _Rejected(Exception):
    """The archive can be read, but is not what was asked for."""


def fetch(data: Data, out: Path, source: str | None = None) -> list[dict[str, Any]]:
    """Put the data set's files into a folder, unless they are there, and record in fetched.json what they are.

    A download that breaks off stays as <archive>.part, and the next call goes on from there. An archive that
    is not what the study says becomes <archive>.rejected. No file is replaced before all are verified.

    Args:
        data: the study's data; its `url` is where the archive is.
        out: the folder to write to.
        source: another address of the archive, or the path of a copy of it, which is only read.

    Returns:
        A row per file: `file`, `bytes`, `sha256`, and `verified`, which is None where the study has no checksum.

    Raises:
        UserError: there is no such source, too little space, or the archive is damaged or another one.
        WorkFailed: the server cannot be reached, fails, or breaks off too often, or the disk is full.
    """
    source = data.url if source is None else source
    by_http = bool(re.match("https?://", source, re.IGNORECASE))
    if not by_http and not Path(source).is_file():
        raise UserError(f"{_public(source)}: no such file, nor an address that begins with http:// or https://")
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".fetch.lock", "another fetch is going on"), _disk_errors(out):
        if rows := _present(data, out):
            say(f"{out}: all files are there, as {RECORD} records them; nothing is fetched")
            return rows
        part = _download(data, source, out) if by_http else None
        archive = part.file if part else Path(source)
        with _judging(archive, part):
            rows = _extract(data, archive, out)
        record = {
            "made_by": f"qlora-recipes {__version__}",
            "source": _public(source) if part else str(archive.resolve()),
            "time": now(),
            "archive": {"bytes": archive.stat().st_size, "sha256": sha256(archive)},
            "files": [row | {"mtime_ns": (out / row["file"]).stat().st_mtime_ns} for row in rows],
        }
        write_atomically(out / RECORD, orjson.dumps(record, option=orjson.OPT_INDENT_2).decode() + "\n")
        if part:
            part.remove()
        return rows


def _public(url: str) -> str:
    """A URL without name, password and query, any of which can be a secret; a path as it is."""
    return re.sub(r"(://)([^/?#]*@)?([^?#]*).*", r"\1\3", url)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Give an error of the disk, such as that it is full, the place that it lacks when it comes from a write."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise WorkFailed(f"{out}: {error.strerror}; what is downloaded stays, and running it again goes on") from None


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; "
            "make room, or name another folder with --out"
        )


def _row(name: str, size: int, digest: str, known: SourceFile) -> dict[str, Any]:
    return {"file": name, "bytes": size, "sha256": digest, "verified": True if known.sha256 == digest else None}


def _present(data: Data, out: Path) -> list[dict[str, Any]]:
    """The rows of the files where all are there, as fetched.json records and the study wants them; else none."""
    recorded = {was["file"]: was for was in read_json(out / RECORD).get("files", [])}
    rows = []
    for name, known in data.files.items():
        file, was = out / name, recorded.get(name)
        if (
            was
            and known.sha256 in (None, was["sha256"])
            and file.is_file()
            and file.stat().st_size == was["bytes"]
            and (file.stat().st_mtime_ns == was["mtime_ns"] or sha256(file) == was["sha256"])
        ):
            rows.append(_row(name, was["bytes"], was["sha256"], known))
        elif was or file.exists():
            say(f"{file}: not as {RECORD} records it; it is fetched again")
    return rows if len(rows) == len(data.files) else []


class _Part:
    """What is there of a download, and beside it, as JSON, of which version of which file it is."""

    def __init__(self, file: Path, url: str):
        self.file, self._url = file, url
        self._about = file.with_name(f"{file.name}.json")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def known(self) -> dict[str, Any]:
        """The whole file's `version` and `bytes`; empty where one cannot go on from what is there."""
        known = read_json(self._about)
        return known if self.size and known.get("url") == self._url and known.get("version") else {}

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def receive(self, response: requests.Response, about: int, bar: Bar) -> str | None:
        """Add what a server sends of a file of `about` so many bytes; why it is not whole now, or None if it is."""
        known, etag = self.known(), response.headers.get("ETag", "W/")
        version = response.headers.get("Last-Modified") if etag.startswith("W/") else etag  # If-Range takes no weak one
        if response.status_code == 200:
            known = {"url": self._url, "version": version, "bytes": int(response.headers.get("Content-Length", 0))}
        else:
            rest = rf"bytes {self.size}-\d+/{known.get('bytes') or '.+'}"
            asked_for = re.fullmatch(rest, response.headers.get("Content-Range", ""))
            if not known or not asked_for or version not in (None, known["version"]):
                self.remove()
                return "the file there is another now"
        total = known["bytes"]
        _check_space(self.file.parent, (total or about) - self.size, "the download")
        if response.status_code == 200:
            if self.size:
                bar.say(f"{self.file}: begun anew; the file there is another, or the server cannot send a part of it")
            self.remove()  # before the new version is noted, which would else be taken for that of the old bytes
            write_atomically(self._about, orjson.dumps(known).decode())
        with self.file.open("ab") as stream:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                bar.update(stream.tell() >> 20, total >> 20)
        return "the connection broke off" if total and self.size != total else None


def _download(data: Data, url: str, out: Path) -> _Part:
    """The whole archive, going on from what an earlier try left of it, if that is of the same file."""
    shown = _public(url)
    part = _Part(out / f"{data.archive}.part", shown)
    by_hand = (
        f"download {_public(data.url)} (its page: {data.source}) on another machine, copy it here, "
        f"and run `recipe data fetch {data.key} --from FILE`"
    )
    why, reached = "", False
    with Bar(f"{data.archive}, MiB") as bar:
        for pause in (0, *PAUSES):
            if why:
                bar.say(f"{shown}: {why}; next try in {pause} s")
                time.sleep(pause)
            headers = {"Accept-Encoding": "identity"}  # so that lengths and ranges are the file's own
            if known := part.known():
                if part.size == known["bytes"]:
                    return part
                headers |= {"Range": f"bytes={part.size}-", "If-Range": known["version"]}
            try:
                with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                    reached, status = True, response.status_code
                    why = f"the server answers {status} {response.reason}"
                    if status in (200, 206, 416):
                        why = part.receive(response, data.archive_bytes, bar) or ""
                        if not why:
                            return part
                    elif status != 429 and status < 500:
                        raise UserError(f"{shown}: {why}; name another address with --from, or {by_hand}")
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                why = f"the connection failed: {_cause(error)}"
                if not reached:
                    raise WorkFailed(f"{shown}: {why}; {by_hand}") from None
            except requests.RequestException as error:  # whose text can show a password
                raise UserError(f"{shown}: not a usable address ({type(error).__name__}); {by_hand}") from None
    there = part.size if part.known() else 0
    raise WorkFailed(
        f"{shown}: {why}, at the last of {len(PAUSES) + 1} tries; run it again, which goes on from "
        f"the {there:,} bytes that are there, or {by_hand}"
    )


def _cause(error: BaseException) -> str:
    """What is behind an error of requests, whose own text is long and repeats the address."""
    while error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def _judging(archive: Path, part: _Part | None) -> Iterator[None]:
    """Tell what is wrong with an archive; one that was downloaded makes way for another download."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeError) as error:
        if part:
            part.remove()
        then = "it is removed; fetch it again" if part else "get it anew"
        raise UserError(f"{archive}: no zip, or a damaged one ({error}); {then}") from None
    except (_Rejected, RuntimeError) as error:  # zipfile's for what is encrypted, or packed by another method
        then = ""
        if part:
            aside = part.file.replace(part.file.with_suffix(".rejected"))
            part.remove()
            then = f"; it is now {aside}, and another fetch begins anew"
        raise UserError(f"{archive}: {error}{then}") from None


def _members(archive: zipfile.ZipFile, data: Data) -> dict[str, zipfile.ZipInfo]:
    """The wanted files in an archive, by their names without folders."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        if member.header_offset < 0:  # zipfile would let it fail as an error of the disk
            raise zipfile.BadZipFile(f"{member.filename!r} begins before the file")
        path = PureWindowsPath(member.filename)  # knows both kinds of slashes, and drives
        if path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
            raise _Rejected(
                f"{member.filename!r} in it is a link or leads out of the folder, so none of it is extracted"
            )
        if path.name not in data.files or member.is_dir():
            continue
        if path.name in found:
            raise _Rejected(f"{path.name} is in it twice: {found[path.name].filename}, {member.filename}")
        found[path.name] = member
    if missing := [name for name in data.files if name not in found]:
        raise _Rejected(f"{', '.join(missing)}: not in it")
    return found


def _extract(data: Data, file: Path, out: Path) -> list[dict[str, Any]]:
    """Put the wanted files of an archive in place, after all of them were verified."""
    rows = []
    for name in data.files:
        clear_parts(out / name)
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(file))
        members = _members(archive, data)
        _check_space(out, sum(member.file_size for member in members.values()), "extracting")
        for name, known in data.files.items():
            member, digest = members[name], hashlib.sha256()
            target = stack.enter_context(replacing(out / name))
            with archive.open(member) as stream, Bar(f"{name}, MiB", member.file_size >> 20) as bar:
                while chunk := stream.read(CHUNK):
                    target.write(chunk)
                    digest.update(chunk)
                    bar.update(target.tell() >> 20)
            target.flush()  # a full disk shows here, before any file is put in place
            row = _row(name, target.tell(), digest.hexdigest(), known)
            if row["bytes"] != member.file_size:
                raise zipfile.BadZipFile(f"{name} is shorter than it says")
            for key, expected in (("bytes", known.bytes), ("sha256", known.sha256)):
                if expected not in (None, row[key]):
                    raise _Rejected(f"{name} in it is not the study's: {key} {expected} expected, {row[key]} found")
            rows.append(row)
    return rows
