"""Fetches a data set's files from where they are published, verifies them, and puts them in place together.

An interrupted download is resumed.
"""

import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import orjson
import requests

from .. import __version__
from ..base.errors import UserError, WorkFailed
from ..base.files import DAMAGED_ZIP, naming, read_json, sha256, write_json
from ..base.hub import limit_waiting
from ..base.machine import now
from ..base.processes import held
from ..base.progress import Bar, say
from .declaration import Data, Source, SourceFile

TIMEOUT = (15, 60)  # seconds: to connect, and without a byte
PAUSES = (2, 5, 15, 30, 60)  # seconds before each further try
CHUNK = 1 << 18  # bytes; at most this many are lost when a connection breaks
RECORD = "fetched.json"
FileRow = dict[str, Any]


class Rejected(Exception):
    """A file's content is not what the study says."""


def fetch(data: Data, out: Path, given: str | None = None, only: Collection[str] | None = None) -> list[FileRow]:
    """Put the data set's files into a folder, unless they are there, and record in fetched.json what they are.

    An interrupted download stays as <file>.part, from which the next call resumes; downloads from the hub stay in its
    cache. A file that is not as the study says becomes <file>.rejected. No file is replaced before all are verified.

    Args:
        data: the study's data; its sources say where everything is.
        out: the folder to write to.
        given: another place of a source: an address, the path of a copy of it, or a folder with several, under the
            names of the sources. Copies are only read.
        only: the wanted sources; by default all.

    Returns:
        A row for each file: `file`, `bytes`, `sha256`, and `verified`, which is None if the study has no checksum.

    Raises:
        UserError: there is no such source, or a file is damaged or another one.
        WorkFailed: a server cannot be reached, fails, or breaks off too often.
        OSError: the disk is full.
    """
    wanted = [name for name in data.sources if only is None or name in only]
    places = _places(data, given, wanted)
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".fetch.lock", "another fetch is running"), naming(out):
        rows = _present(data, out, wanted)
        missing = [name for name in wanted if name not in rows]
        if missing:
            for left in out.glob(".fetching-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=out, prefix=".fetching-") as staging:
                fetching = _Fetching(data, out, Path(staging))
                rows |= {name: fetching.source(name, places.get(name)) for name in missing}
                fetching.finish(rows)
        else:
            say(f"{out}: all files are there, as recorded in {RECORD}; nothing is fetched")
        return [row for name in wanted for row in rows[name]]


def _places(data: Data, given: str | None, wanted: list[str]) -> dict[str, str | Path]:
    """The addresses and copies that a user names, by source."""
    if given is None:
        return {}
    path = Path(given)
    if given and path.is_dir():
        copies = {name: copy for name, source in data.sources.items() if (copy := _copy_in(path, name, source))}
        if not copies:
            raise UserError(f"{given}: holds none of {', '.join(data.sources)}")
        return dict(copies)
    is_address = re.match("https?://", given, re.IGNORECASE)
    if not is_address and not path.is_file():
        raise UserError(f"{public(given)}: no such file, nor an address that begins with http:// or https://")
    name = PurePath(public(given)).name
    named = wanted if len(wanted) == 1 else [source for source in wanted if PurePath(source).name == name]
    if not named:
        raise UserError(
            f"{public(given)}: no source of that name; there are {', '.join(data.sources)}; name it by --only"
        )
    return {named[0]: given if is_address else path}


def _copy_in(folder: Path, name: str, source: Source) -> Path | None:
    """The copy of a source in a folder: the file of its name, or a copy of a hub's repository."""
    repository = folder / str(source.hub).rpartition("/")[2]
    if (folder / name).is_file():
        return folder / name
    return repository if source.hub and source.kind == "dataset" and repository.is_dir() else None


def _present(data: Data, out: Path, wanted: list[str]) -> dict[str, list[FileRow]]:
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


def _row(name: str, file: Path, known: SourceFile) -> FileRow:
    verified = True if known.sha256 else None
    return {"file": name, "bytes": file.stat().st_size, "sha256": sha256(file), "verified": verified}


def _verified(name: str, file: Path, known: SourceFile) -> FileRow:
    """The row of a file.

    Raises:
        Rejected: it is not the study's.
    """
    row = _row(name, file, known)
    for key, expected in (("bytes", known.bytes), ("sha256", known.sha256)):
        if expected not in (None, row[key]):
            raise Rejected(f"{name} is not the study's: {key} {expected} expected, {row[key]} found")
    return row


@dataclass
class _Fetching:
    """Files that are fetched together; they take their places at the end."""

    data: Data
    out: Path
    staging: Path
    places: dict[str, Path] = field(default_factory=dict)  # verified files, by the name that they will have
    record: dict[str, Any] = field(default_factory=dict)

    def source(self, name: str, given: str | Path | None) -> list[FileRow]:
        """Fetch and verify a source; the rows of its files."""
        source = self.data.sources[name]
        place = given or source.url or str(source.hub)
        origin = str(place.resolve()) if isinstance(place, Path) else public(place)
        self.record[name] = {"from": origin, "revision": None if given else source.revision, "time": now()}
        file = part = self.out / f"{name}.part"
        try:
            if isinstance(given, Path) and given.is_file():
                file = given
            elif url := given if isinstance(given, str) else source.url:
                download(url, part)
            else:
                with _hub_errors(str(source.hub)):
                    file = self._from_hub(name, source, Path(given) if given else None)
            if source.files:
                return self._extracted(file, source.files, source.sha256)
            self.places[name] = file if file == part else self._copied(name, file)
            return [_verified(name, file, source)]
        except (Rejected, RuntimeError, *DAMAGED_ZIP) as error:  # RuntimeError: encrypted, or packed by another method
            aside = ""
            if file == part and part.exists():
                aside = f"; it is now {part.replace(part.with_suffix('.rejected'))}; the next fetch starts over"
                _version_file(part).unlink()
            raise UserError(f"{file}: {error}{aside}") from None
        except (UserError, WorkFailed) as error:
            raise type(error)(
                f"{error}; or download {public(source.url or str(source.hub))} (page: {self.data.source}) on another "
                f"machine, copy it here, and run `recipe data fetch {self.data.key} --only {name} --from FILE`"
            ) from None

    def _from_hub(self, name: str, source: Source, copy: Path | None) -> Path:
        """A file of a hub's repository, in the hub's cache, or a split of a data set, or of a copy, as JSON lines."""
        if source.kind == "model":
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(str(source.hub), source.file or name, revision=source.revision))
        import datasets

        datasets.disable_progress_bars()
        where, revision = (str(copy), None) if copy else (source.hub, source.revision)
        rows = datasets.load_dataset(where, source.config, split=source.split, revision=revision)
        if source.rows not in (None, len(rows)):
            raise Rejected(f"{name} is not the study's: rows {source.rows} expected, {len(rows)} found")
        file = self._staged(name)
        with Bar(f"{name}, rows", len(rows)) as bar, file.open("wb") as stream:
            for count, batch in enumerate(rows.iter(1000), start=1):
                for values in zip(*batch.values(), strict=True):
                    stream.write(orjson.dumps(dict(zip(batch, values, strict=True)), default=str) + b"\n")
                bar.update(min(count * 1000, len(rows)))
        return file

    def _staged(self, name: str) -> Path:
        """The path of a file until it takes its place."""
        file = self.staging / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def _copied(self, name: str, file: Path) -> Path:
        copy = self._staged(name)
        if file != copy:
            shutil.copyfile(file, copy)
        return copy

    def _extracted(self, file: Path, files: dict[str, SourceFile], checksum: str | None) -> list[FileRow]:
        """The rows of the wanted files of a zip, which are extracted by their names alone."""
        _verified(file.name, file, SourceFile(sha256=checksum))
        with zipfile.ZipFile(file) as archive:
            members = {name: [m for m in archive.infolist() if PurePath(m.filename).name == name] for name in files}
            if wrong := [name for name, found in members.items() if len(found) != 1]:
                raise Rejected(f"{', '.join(wrong)}: not in it, or twice")
            for name, (member,) in members.items():
                self.places[name] = self.staging / name
                with archive.open(member) as stream, self.places[name].open("wb") as copy:
                    shutil.copyfileobj(stream, copy)
        return [_verified(name, self.places[name], known) for name, known in files.items()]

    def finish(self, rows: dict[str, list[FileRow]]) -> None:
        """Put all files in place, record them, and remove downloads that are not needed any more."""
        for name, file in self.places.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(self.out / name)
        files = [row for of_source in rows.values() for row in of_source]
        former = read_json(self.out / RECORD).get("sources", {})
        record = {"made_by": f"qlora-recipes {__version__}", "sources": former | self.record, "files": files}
        write_json(self.out / RECORD, record)
        for name in self.record:
            part = self.out / f"{name}.part"
            part.unlink(missing_ok=True)
            _version_file(part).unlink(missing_ok=True)


def public(url: str) -> str:
    """A URL without name, password and query, any of which can be secret; a path is unchanged."""
    return re.sub(r"(://)([^/?#:]*:(?!\d+/)[^?#]*@|[^/?#]*@)?([^?#]*).*", r"\1\3", url)


def _version_file(part: Path) -> Path:
    """The file with the address and version of a file whose download has begun."""
    return part.with_name(f"{part.name}.json")


def download(url: str, part: Path) -> None:
    """Download the file at an address, resuming an earlier call's download of the same version.

    Raises:
        UserError: the address is invalid, or the server refuses.
        WorkFailed: the server cannot be reached, fails, or breaks off too often.
    """
    shown = public(url)
    part.parent.mkdir(parents=True, exist_ok=True)
    with Bar(f"{part.stem}, MiB") as bar:
        for pause in (*PAUSES, None):
            try:
                problem = _receive(url, part, bar)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"the connection failed: {_cause(error)}"
                if not _version_file(part).exists():  # the server was never reached
                    break
            except requests.RequestException as error:  # whose text can show a password
                answer = f"{error.response.status_code} {error.response.reason}" if error.response is not None else ""
                raise UserError(f"{shown}: {answer or type(error).__name__}; name another address") from None
            if not problem:
                return
            if pause is not None:
                say(f"{shown}: {problem}; next try in {pause} s")
                time.sleep(pause)
    size = part.stat().st_size if part.exists() else 0
    raise WorkFailed(f"{shown}: {problem}; run it again to resume from {size:,} bytes")


def _receive(url: str, part: Path, bar: Bar) -> str:
    """Append what a server sends; the reason why the file is not whole yet, or nothing if it is.

    Beside the file are its address and version, by which another call resumes.
    """
    known = read_json(_version_file(part))
    size = part.stat().st_size if part.exists() and known.get("url") == public(url) and known.get("version") else 0
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
            known = {"url": public(url), "version": version, "bytes": int(response.headers.get("Content-Length", 0))}
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

    limit_waiting()
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    unreached = (errors.LocalEntryNotFoundError, ConnectionError, HTTPError)
    try:
        yield
    except (*absent, *unreached, DatasetsError, ValueError) as error:  # ValueError: an unknown split or configuration
        problem = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, unreached) and not isinstance(error, absent):
            raise WorkFailed(f"{repository}: the hub cannot be reached: {problem}") from None
        raise UserError(f"{repository}: {problem}") from None
