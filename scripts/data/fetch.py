"""Download and verify the published files of a data set.

Interrupted downloads are resumed.
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
from ..base.processes import held
from ..base.secrets import without_secrets
from ..base.terminal import Bar, say
from .declaration import Data, DataSource, SourceFile

TIMEOUT = (15, 60)  # seconds to wait for a connection, and for the next bytes
PAUSES = (2, 5, 15, 30, 60)  # seconds before each retry
CHUNK = 1 << 18  # bytes; a broken connection loses at most one chunk
MOST_BYTES = 1 << 36  # bytes of a download, if study.yaml does not declare its size
MOST_RATIO = 100  # times the size of a zip: size of a file in it, if study.yaml does not declare that
RECORD = "fetched.json"
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeError)  # errors that zipfile raises


class Rejected(Exception):
    """Content that contradicts study.yaml."""


def fetch(data: Data, out: Path, only: Collection[str] | None = None) -> list[Row]:
    """Fetch missing files of a data set, and record all files in fetched.json.

    The next call resumes an interrupted download from <file>.part, or from the hub's cache. A download from a web
    address is renamed to <file>.rejected if it is damaged or contradicts study.yaml. The files of a source are replaced
    only after all of them are verified.

    Args:
        data: the study's data, with the sources.
        out: folder to write to.
        only: names of wanted sources; by default all.

    Returns:
        A row for each file: `file`, `bytes`, `sha256`, and `verified`, which is None if study.yaml has no checksum.

    Raises:
        UserError: a server refuses a request, a file is damaged or contradicts study.yaml, a file that users must copy
            is missing, or another process fetches into the folder.
        WorkFailed: a server cannot be reached or fails, or the connection breaks too often.
        OSError: the disk is full.
    """
    wanted = [name for name in data.sources if only is None or name in only]
    own = (file for name in wanted if data.sources[name].is_own for file in data.sources[name].files or (name,))
    if absent := [file for file in own if not (out / file).is_file()]:
        raise UserError(
            f"{out / absent[0]}: no such file, and study.yaml gives neither url nor hub for it; copy it there, or run "
            "`recipe data prepare --study STUDY FOLDER`, where FOLDER contains the file"
        )
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".fetch.lock", "another fetch is running"), naming(out):
        rows = _present(data, out, wanted)
        missing = [name for name in wanted if name not in rows]
        if not missing:
            say(f"{out}: all files exist and are unchanged; nothing to fetch")
        for left in out.glob(".fetching-*"):  # leftovers of a killed process
            shutil.rmtree(left, ignore_errors=True)
        for name in missing:
            with tempfile.TemporaryDirectory(dir=out, prefix=".fetching-") as staging:
                found = _fetched(name, data, out, Path(staging))
                rows[name] = [row for row, _ in found]
                files = [row for of_source in rows.values() for row in of_source]
                # before the files move into place: a killed process then leaves only files that the record lists
                write_json(out / RECORD, {"made_by": f"qlora-recipes {__version__}", "files": files})
                for row, path in found:
                    (out / row["file"]).parent.mkdir(parents=True, exist_ok=True)
                    path.replace(out / row["file"])
            part = out / f"{name}.part"
            for file in (part, _version_file(part)):
                file.unlink(missing_ok=True)
        return [row for name in wanted for row in rows[name]]


def _present(data: Data, out: Path, wanted: list[str]) -> dict[str, list[Row]]:
    """Table rows of complete sources; logs files that will be fetched again."""
    recorded = _recorded(out)
    present = {}
    for source_name, source in data.sources.items():
        files = source.files or {source_name: source}
        rows = [_row(name, out / name, known) for name, known in files.items() if (out / name).is_file()]
        expected = [known.sha256 or recorded.get(name) for name, known in files.items()]
        if [row["sha256"] for row in rows] == expected or (rows and source.is_own):
            present[source_name] = rows
        elif source_name in wanted:
            for name in files:
                if name not in recorded and (out / name).exists():
                    raise UserError(f"{out / name}: not replaced, because {RECORD} does not list it; move it away")
            if there := [name for name in files if name in recorded]:
                say(f"{out}: fetching changed or incomplete files again: {', '.join(there)}")
    return present


def _recorded(out: Path) -> dict[str, str]:
    """SHA-256 of each file in fetched.json; nothing from a damaged record."""
    try:
        return {row["file"]: row["sha256"] for row in read_json(out / RECORD).get("files", [])}
    except (KeyError, TypeError):
        return {}


def _row(name: str, file: Path, known: SourceFile) -> Row:
    digest = sha256(file)
    verified = digest == known.sha256 if known.sha256 else None
    return {"file": name, "bytes": file.stat().st_size, "sha256": digest, "verified": verified}


def _verified(name: str, file: Path, known: SourceFile) -> Row:
    """Table row of a verified file.

    Raises:
        Rejected: the size or checksum differs from study.yaml.
    """
    row = _row(name, file, known)
    for key, expected in (("bytes", known.bytes), ("sha256", known.sha256)):
        if expected not in (None, row[key]):
            raise Rejected(f"{name} differs from study.yaml: {key} {expected} expected, {row[key]} found")
    return row


def _fetched(name: str, data: Data, out: Path, staging: Path) -> list[tuple[Row, Path]]:
    """Fetch a source; return table rows of its verified files, with the places where these are."""
    source = data.sources[name]
    part = out / f"{name}.part"
    try:
        if source.url:
            download(source.url, part, 2 * source.bytes if source.bytes else MOST_BYTES)
            found = {name: part}
        else:
            with _hub_errors(str(source.hub)):
                found = {name: _from_hub(name, source, staging / "copy")}
        if source.files:
            found = _extracted(found[name], source, staging)
        files = source.files or {name: source}
        return [(_verified(member, path, files[member]), path) for member, path in found.items()]
    except (Rejected, RuntimeError, *DAMAGED_ZIP) as error:  # RuntimeError: unknown encryption or compression
        aside = ""
        if part.exists():
            aside = f"; moved to {part.replace(part.with_suffix('.rejected'))}; the next fetch starts over"
            _version_file(part).unlink(missing_ok=True)
        raise UserError(f"{part}: {error}{aside}") from None
    except (UserError, WorkFailed) as error:
        raise type(error)(
            f"{error}; or run `recipe data fetch {data.key}` on another machine and copy the folder to {out}, or give "
            f"files from {data.source or data.name} to `recipe data prepare`"
        ) from None


def _from_hub(name: str, source: DataSource, file: Path) -> Path:
    """Download a file of a model, or write a data set's split as JSON lines."""
    if source.kind == "model":
        from huggingface_hub import hf_hub_download

        return Path(
            shutil.copyfile(hf_hub_download(str(source.hub), source.file or name, revision=source.revision), file)
        )
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    if source.rows not in (None, len(rows)):
        raise Rejected(f"{name} differs from study.yaml: rows {source.rows} expected, {len(rows)} found")
    with Bar(f"{name}, rows", len(rows)) as bar, file.open("wb") as stream:
        for count, batch in enumerate(rows.iter(1000), start=1):
            for values in zip(*batch.values(), strict=True):
                stream.write(orjson.dumps(dict(zip(batch, values, strict=True)), default=str) + b"\n")
            bar.update(min(count * 1000, len(rows)))
    return file


def _extracted(file: Path, source: DataSource, staging: Path) -> dict[str, Path]:
    """Extract wanted files from a zip, by name without folders."""
    _verified(file.name, file, SourceFile(sha256=source.sha256))
    files = {name: staging / name for name in source.files or ()}
    with zipfile.ZipFile(file) as archive:
        members = {name: [m for m in archive.infolist() if PurePath(m.filename).name == name] for name in files}
        if wrong := [name for name, found in members.items() if len(found) != 1]:
            raise Rejected(f"{', '.join(wrong)}: missing from the zip, or present twice")
        for name, (member,) in members.items():
            most = (source.files or {})[name].bytes or MOST_RATIO * file.stat().st_size
            _require_size(name, member.file_size, most)
            with archive.open(member) as stream, files[name].open("wb") as copy:
                shutil.copyfileobj(stream, copy)
    return files


def _require_size(name: str, size: int, most: int) -> None:
    """Raise Rejected if a file is larger than a limit."""
    if size > most:
        raise Rejected(f"{name} is larger than {most:,} bytes; if that is right, declare its `bytes` in study.yaml")


def _partial(part: Path, url: str) -> Row:
    """Version and size of a partial download; null and 0 if it has another address, or its record is damaged."""
    known = read_json(_version_file(part))
    has_sizes = isinstance(known.get("version"), str) and isinstance(known.get("bytes"), int)
    if known.get("url") == without_secrets(url) and has_sizes:
        return known
    return {"version": None, "bytes": 0}


def _version_file(part: Path) -> Path:
    """File with the address and version of a partial download."""
    return part.with_name(f"{part.name}.json")


def download(url: str, part: Path, most: int) -> None:
    """Download a file of at most `most` bytes; resume an interrupted download of the same version.

    Raises:
        Rejected: the file is larger.
        UserError: the address is invalid, or the server refuses.
        WorkFailed: the server cannot be reached or fails, or the connection breaks too often.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    with Bar(f"{part.stem}, MiB") as bar:
        for pause in (*PAUSES, None):
            try:
                problem = _receive(url, part, most, bar)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"the connection failed: {_cause(error)}"
                if not _version_file(part).exists():  # the server was never reached
                    break
            except requests.RequestException as error:
                answer = f"{error.response.status_code} {error.response.reason}" if error.response is not None else ""
                raise UserError(f"{url}: {answer or type(error).__name__}") from None
            except ValueError as error:  # from urllib, for a redirect
                raise UserError(f"{url}: the server redirects to an invalid address: {error}") from None
            if not problem:
                return
            if pause is not None:
                say(f"{url}: {problem}; next try in {pause} s")
                time.sleep(pause)
    size = part.stat().st_size if part.exists() else 0
    raise WorkFailed(f"{url}: {problem}" + (f"; repeat the command to resume from {size:,} bytes" if size else ""))


def _receive(url: str, part: Path, most: int, bar: Bar) -> str:
    """Append a server's response to a file; return the problem, or "" on success.

    The address and version are recorded beside the file, so that a later call can resume the download.
    """
    known = _partial(part, url)
    size = part.stat().st_size if part.exists() and known["version"] else 0
    if size and size == known["bytes"]:
        return ""
    headers = {"Accept-Encoding": "identity"}  # without compression, lengths and ranges count bytes of the file
    if size:
        headers |= {"Range": f"bytes={size}-", "If-Range": known["version"]}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        etag = response.headers.get("ETag", "W/")
        # a weak ETag does not identify the bytes
        version = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
        rest = rf"bytes {size}-\d+/{known['bytes'] or '.+'}"
        continues = re.fullmatch(rest, response.headers.get("Content-Range", ""))
        resumes = size and continues and version in (None, known["version"])
        if response.status_code == 416 or (response.status_code == 206 and not resumes):
            part.unlink(missing_ok=True)
            return "the file on the server has changed"
        if response.status_code == 429 or response.status_code >= 500:
            return f"the server answers {response.status_code} {response.reason}"
        response.raise_for_status()
        if response.status_code not in (200, 206):
            raise UserError(f"{url}: the server answers {response.status_code} {response.reason} instead of the file")
        if response.status_code == 200:
            length = response.headers.get("Content-Length", "0")
            if not re.fullmatch(r"(?a)\d{1,18}", length):
                raise UserError(f"{url}: the server's Content-Length is not a size: {length:.40}")
            if size:
                say(f"{part}: starting over; the server's file has changed, or the server cannot send parts")
            part.unlink(missing_ok=True)  # delete the old part before recording the new version
            known = {"url": without_secrets(url), "version": version, "bytes": int(length)}
            write_json(_version_file(part), known)
        with naming(part), part.open("ab") as stream:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                _require_size(part.stem, stream.tell(), most)
                bar.update(stream.tell() >> 20, known["bytes"] >> 20)
    return "the connection was lost" if known["bytes"] and part.stat().st_size != known["bytes"] else ""


def _cause(error: BaseException) -> str:
    """Root cause of an error from requests, as a short text."""
    while error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Convert errors of the hub's clients to UserError or WorkFailed."""
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
