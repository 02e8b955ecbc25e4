"""Fetches a data set's files from where they are published, verifies them, and puts them in place.

An interrupted download is resumed.
"""

import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import orjson
import requests

from .. import __version__
from ..base.errors import UserError, WorkFailed
from ..base.files import Row, naming, read_json, sha256, write_json
from ..base.machine import held, now
from ..base.progress import Bar, say
from .declaration import Data, DataSource, SourceFile

TIMEOUT = (15, 60)  # seconds: to connect, and without a byte
PAUSES = (2, 5, 15, 30, 60)  # seconds before each further try
CHUNK = 1 << 18  # bytes; at most this many are lost when a connection breaks
RECORD = "fetched.json"
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeError)  # what zipfile raises for one


class Rejected(Exception):
    """A file's content is not what the study says."""


def fetch(data: Data, out: Path, only: Collection[str] | None = None) -> list[Row]:
    """Fetch the missing files of a data set into a folder, and record all in fetched.json.

    An interrupted download stays as <file>.part, from which the next call resumes; downloads from the hub stay in its
    cache. A file that is not as the study says becomes <file>.rejected. No file of a source is replaced before all of
    them are verified.

    Args:
        data: the study's data; its sources say where everything is.
        out: the folder to write to.
        only: the wanted sources; by default all.

    Returns:
        A row for each file: `file`, `bytes`, `sha256`, and `verified`, which is None if the study has no checksum.

    Raises:
        UserError: there is no such source, or a file is damaged or another one.
        WorkFailed: a server cannot be reached, fails, or breaks off too often.
        OSError: the disk is full.
    """
    wanted = [name for name in data.sources if only is None or name in only]
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".fetch.lock", "another fetch is running"), naming(out):
        rows = _present(data, out, wanted)
        missing = [name for name in wanted if name not in rows]
        if not missing:
            say(f"{out}: all files are there, as recorded in {RECORD}; nothing is fetched")
        for left in out.glob(".fetching-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        for name in missing:
            source = data.sources[name]
            with tempfile.TemporaryDirectory(dir=out, prefix=".fetching-") as staging:
                rows[name] = _fetched(data, name, out, Path(staging))
            record = {"from": source.url or source.hub, "revision": source.revision, "time": now()}
            sources = read_json(out / RECORD).get("sources", {}) | {name: record}
            files = [row for of_source in rows.values() for row in of_source]
            write_json(out / RECORD, {"made_by": f"qlora-recipes {__version__}", "sources": sources, "files": files})
        return [row for name in wanted for row in rows[name]]


def _present(data: Data, out: Path, wanted: list[str]) -> dict[str, list[Row]]:
    """The rows of the sources whose files are all there, as fetched.json records and the study wants them; reports
    wanted files that are otherwise."""
    recorded = {was["file"]: was["sha256"] for was in read_json(out / RECORD).get("files", [])}
    present = {}
    for source_name, source in data.sources.items():
        files = source.files or {source_name: source}
        rows = [
            _row(name, out / name, known)
            for name, known in files.items()
            if known.sha256 in (None, recorded.get(name)) and (out / name).is_file()
        ]
        if len(rows) == len(files) and all(row["sha256"] == recorded.get(row["file"]) for row in rows):
            present[source_name] = rows
        elif source_name in wanted and (there := [name for name in files if name in recorded or (out / name).exists()]):
            say(f"{out}: not as recorded in {RECORD}, and fetched again: {', '.join(there)}")
    return present


def _row(name: str, file: Path, known: SourceFile) -> Row:
    verified = True if known.sha256 else None
    return {"file": name, "bytes": file.stat().st_size, "sha256": sha256(file), "verified": verified}


def _verified(name: str, file: Path, known: SourceFile) -> Row:
    """The row of a file.

    Raises:
        Rejected: it is not the study's.
    """
    row = _row(name, file, known)
    for key, expected in (("bytes", known.bytes), ("sha256", known.sha256)):
        if expected not in (None, row[key]):
            raise Rejected(f"{name} is not the study's: {key} {expected} expected, {row[key]} found")
    return row


def _fetched(data: Data, name: str, out: Path, staging: Path) -> list[Row]:
    """Fetch and verify a source, and put its files in place; their rows."""
    source, part = data.sources[name], out / f"{name}.part"
    try:
        if source.url:
            download(source.url, part)
            found = {name: part}
        else:
            with _hub_errors(str(source.hub)):
                found = {name: _from_hub(name, source, staging / "copy")}
        if source.files:
            found = _extracted(found[name], source, staging)
        files = source.files or {name: source}
        rows = [_verified(member, path, files[member]) for member, path in found.items()]
    except (Rejected, RuntimeError, *DAMAGED_ZIP) as error:  # RuntimeError: encrypted, or packed by another method
        aside = ""
        if part.exists():
            aside = f"; it is now {part.replace(part.with_suffix('.rejected'))}; the next fetch starts over"
            _version_file(part).unlink()
        raise UserError(f"{part}: {error}{aside}") from None
    except (UserError, WorkFailed) as error:
        raise type(error)(
            f"{error}; or run `recipe data fetch {data.key}` on another machine and copy its folder to {out}, or give "
            f"files from {data.source} to `recipe data prepare`"
        ) from None
    for member, path in found.items():
        (out / member).parent.mkdir(parents=True, exist_ok=True)
        path.replace(out / member)
    for left in (part, _version_file(part)):
        left.unlink(missing_ok=True)
    return rows


def _from_hub(name: str, source: DataSource, file: Path) -> Path:
    """Write a file of a hub's repository, or a split of a data set as JSON lines."""
    if source.kind == "model":
        from huggingface_hub import hf_hub_download

        return Path(
            shutil.copyfile(hf_hub_download(str(source.hub), source.file or name, revision=source.revision), file)
        )
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    if source.rows not in (None, len(rows)):
        raise Rejected(f"{name} is not the study's: rows {source.rows} expected, {len(rows)} found")
    with Bar(f"{name}, rows", len(rows)) as bar, file.open("wb") as stream:
        for count, batch in enumerate(rows.iter(1000), start=1):
            for values in zip(*batch.values(), strict=True):
                stream.write(orjson.dumps(dict(zip(batch, values, strict=True)), default=str) + b"\n")
            bar.update(min(count * 1000, len(rows)))
    return file


def _extracted(file: Path, source: DataSource, staging: Path) -> dict[str, Path]:
    """The wanted files of a zip, which are extracted by their names alone."""
    _verified(file.name, file, SourceFile(sha256=source.sha256))
    files = {name: staging / name for name in source.files or ()}
    with zipfile.ZipFile(file) as archive:
        members = {name: [m for m in archive.infolist() if PurePath(m.filename).name == name] for name in files}
        if wrong := [name for name, found in members.items() if len(found) != 1]:
            raise Rejected(f"{', '.join(wrong)}: not in it, or twice")
        for name, (member,) in members.items():
            with archive.open(member) as stream, files[name].open("wb") as copy:
                shutil.copyfileobj(stream, copy)
    return files


def _version_file(part: Path) -> Path:
    """The file with the address and version of a file whose download has begun."""
    return part.with_name(f"{part.name}.json")


def download(url: str, part: Path) -> None:
    """Download the file at an address, resuming an earlier call's download of the same version.

    Raises:
        UserError: the address is invalid, or the server refuses.
        WorkFailed: the server cannot be reached, fails, or breaks off too often.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    with Bar(f"{part.stem}, MiB") as bar:
        for pause in (*PAUSES, None):
            try:
                problem = _receive(url, part, bar)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"the connection failed: {_cause(error)}"
                if not _version_file(part).exists():  # the server was never reached
                    break
            except requests.RequestException as error:
                answer = f"{error.response.status_code} {error.response.reason}" if error.response is not None else ""
                raise UserError(f"{url}: {answer or type(error).__name__}") from None
            if not problem:
                return
            if pause is not None:
                say(f"{url}: {problem}; next try in {pause} s")
                time.sleep(pause)
    size = part.stat().st_size if part.exists() else 0
    raise WorkFailed(f"{url}: {problem}; run it again to resume from {size:,} bytes")


def _receive(url: str, part: Path, bar: Bar) -> str:
    """Append a server's answer; return the reason for an incomplete file, else nothing.

    Beside the file are its address and version, by which another call resumes.
    """
    known = read_json(_version_file(part))
    size = part.stat().st_size if part.exists() and known.get("url") == url and known.get("version") else 0
    if size and size == known["bytes"]:
        return ""
    headers = {"Accept-Encoding": "identity"}  # so that lengths and ranges are the file's own
    if size:
        headers |= {"Range": f"bytes={size}-", "If-Range": known["version"]}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        etag = response.headers.get("ETag", "W/")
        version = response.headers.get("Last-Modified") if etag.startswith("W/") else etag  # If-Range takes no weak one
        rest = rf"bytes {size}-\d+/{known.get('bytes') or '.+'}"
        continues = re.fullmatch(rest, response.headers.get("Content-Range", ""))
        resumes = continues and version in (None, known["version"])
        if response.status_code == 416 or (response.status_code == 206 and not resumes):
            part.unlink()
            return "the file on the server has changed"
        if response.status_code == 429 or response.status_code >= 500:
            return f"the server answers {response.status_code} {response.reason}"
        response.raise_for_status()
        if response.status_code != 206:
            if size:
                say(f"{part}: starting over; the server has another file now, or cannot send a part of it")
            part.unlink(missing_ok=True)  # before the new version is recorded, which would else seem to be its own
            known = {"url": url, "version": version, "bytes": int(response.headers.get("Content-Length", 0))}
            write_json(_version_file(part), known)
        with naming(part), part.open("ab") as stream:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                bar.update(stream.tell() >> 20, known["bytes"] >> 20)
    return "the connection broke off" if known["bytes"] and part.stat().st_size != known["bytes"] else ""


def _cause(error: BaseException) -> str:
    """The cause of an error from requests, whose own text is long and repeats the address."""
    while error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Report errors of the hub's clients with the repository."""
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError
    from huggingface_hub import errors

    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    unreached = (errors.LocalEntryNotFoundError, ConnectionError, HTTPError)
    try:
        yield
    except (*absent, *unreached, DatasetsError, ValueError) as error:  # ValueError: an unknown split or configuration
        problem = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, unreached) and not isinstance(error, absent):
            raise WorkFailed(f"{repository}: the hub cannot be reached: {problem}") from None
        raise UserError(f"{repository}: {problem}") from None
