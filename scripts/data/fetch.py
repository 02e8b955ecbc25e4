"""Download and verify the published files of a data set."""

import shutil
import tempfile
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from urllib.parse import urljoin, urlsplit

import orjson
import requests

from ..base.errors import UserError, WorkFailed, one_line
from ..base.files import Row, naming, sha256
from ..base.processes import held
from ..base.terminal import Bar, say
from .declaration import Data, DataSource, SourceFile

TIMEOUT = (15, 60)  # seconds to wait for a connection, and for the next bytes
PAUSES = (2, 5, 15, 30, 60)  # seconds before each retry
CHUNK = 1 << 18  # bytes; a broken connection loses at most one chunk
MOST_BYTES = 1 << 36  # bytes of a download, if study.yaml does not declare its size
MOST_RATIO = 100  # times the size of a zip: size of a file in it, if study.yaml does not declare that
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, UnicodeError)  # errors that zipfile raises


class Rejected(Exception):
    """Content that contradicts study.yaml."""


def fetch(data: Data, out: Path, wanted: Collection[str]) -> list[Row]:
    """Fetch missing files of a data set; existing files are verified, and never replaced.

    The next call resumes an interrupted download from <file>.part if a checksum verifies it (see `_received`), or
    from the hub's cache. A download from a web URL is renamed to <file>.rejected if it is damaged or contradicts
    study.yaml. The files of a source move into place only after all of them are verified.

    Args:
        data: the study's data, with the sources.
        out: folder to write to.
        wanted: names of the sources to fetch.

    Returns:
        A row for each file: `file`, `bytes`, `sha256`, and `verified`, which is None if study.yaml has no checksum.

    Raises:
        UserError: a server refuses a request, a file is damaged or contradicts study.yaml, a file that users must copy
            is missing, or another process fetches into the folder.
        WorkFailed: a server cannot be reached or fails, or the connection breaks too often.
        OSError: the disk is full.
    """
    _require_users_files(data, out, wanted)
    out.mkdir(parents=True, exist_ok=True)
    by_hand = f"or run {data.fetch_command(wanted)} on another machine and copy the folder to {out}"
    with held(out / ".fetch.lock", "another fetch is running"), naming(out):
        for folder in out.glob(".fetching-*"):  # leftovers of a killed process
            shutil.rmtree(folder, ignore_errors=True)
        rows = []
        for name in wanted:
            rows += _fetch_source(name, data, out, by_hand)
    return rows


def _require_users_files(data: Data, out: Path, wanted: Iterable[str]) -> None:
    """Raise UserError if a file is missing that nobody publishes."""
    for name in wanted:
        source = data.sources[name]
        for file in source.contents(name):
            if source.is_own and not (out / file).is_file():
                problem = "no such file, and study.yaml gives neither url nor hub for it"
                command = "`recipe data prepare --study STUDY FOLDER`, where FOLDER contains the file"
                raise UserError(problem, file=out / file, remedy=f"copy it there, or run {command}")


def _fetch_source(name: str, data: Data, out: Path, by_hand: str) -> list[Row]:
    """Fetch a source if files of it are missing; return the table rows of its files.

    Args:
        by_hand: remedy if the server cannot be reached or refuses.

    Raises:
        UserError: an existing file differs from study.yaml, or see `fetch`.
    """
    source = data.sources[name]
    contents = source.contents(name)
    missing = [file for file in contents if not (out / file).exists()]
    if missing:
        with tempfile.TemporaryDirectory(dir=out, prefix=".fetching-") as staging:
            files = _verified_files(name, data, out, Path(staging), by_hand)
            for file in missing:
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                files[file].replace(out / file)
    (out / f"{name}.part").unlink(missing_ok=True)
    rows = [_row(file, out / file, facts) for file, facts in contents.items()]
    for row in rows:
        if row["verified"] is False and not source.is_own:
            raise UserError("differs from study.yaml", file=out / row["file"], remedy="move it away, and fetch again")
    return rows


def _row(name: str, file: Path, facts: SourceFile) -> Row:
    digest = sha256(file)
    verified = digest == facts.sha256 if facts.sha256 else None
    return {"file": name, "bytes": file.stat().st_size, "sha256": digest, "verified": verified}


def _verify(name: str, file: Path, facts: SourceFile) -> None:
    """Raise Rejected if a file's size or checksum differs from study.yaml."""
    row = _row(name, file, facts)
    for key, expected in (("bytes", facts.bytes), ("sha256", facts.sha256)):
        if expected not in (None, row[key]):
            raise Rejected(f"{name} differs from study.yaml: {key} {expected} expected, {row[key]} found")


def _verified_files(name: str, data: Data, out: Path, staging: Path, by_hand: str) -> dict[str, Path]:
    """Download a source; return the paths of its verified files, in `staging` or the partial download."""
    source = data.sources[name]
    part = out / f"{name}.part"
    try:
        files = _download_source(name, source, part, staging)
        for file, facts in source.contents(name).items():
            _verify(file, files[file], facts)
        return files
    except (Rejected, RuntimeError, *DAMAGED_ZIP) as error:  # RuntimeError: unknown encryption or compression
        remedy = ""
        if part.exists():
            remedy = f"moved to {part.replace(part.with_suffix('.rejected'))}; the next fetch starts over"
        raise UserError(str(error), file=part, remedy=remedy) from None
    except (UserError, WorkFailed) as error:
        raise type(error)(f"{error}; {by_hand}") from None


def _download_source(name: str, source: DataSource, part: Path, staging: Path) -> dict[str, Path]:
    """Download a source; return the paths of its files, in `staging` or `part`."""
    if source.url:
        file = part
        download(source, source.url, part)
    else:
        file = staging / "copy"
        with _hub_errors(str(source.hub)):
            _download_from_hub(name, source, file)
    if source.files:
        return _extracted(file, source, source.files, staging)
    return {name: file}


def _download_from_hub(name: str, source: DataSource, file: Path) -> None:
    """Write a file of a model, or a data set's split as JSON lines."""
    if source.kind == "model":
        from huggingface_hub import hf_hub_download

        shutil.copyfile(hf_hub_download(str(source.hub), source.file or name, revision=source.revision), file)
        return
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


def _extracted(file: Path, source: DataSource, wanted: Mapping[str, SourceFile], staging: Path) -> dict[str, Path]:
    """Extract wanted files from a zip, by name without folders."""
    _verify(file.name, file, SourceFile(sha256=source.sha256))
    members = defaultdict(list)
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            members[PurePath(member.filename).name].append(member)
        wrong = [name for name in wanted if len(members[name]) != 1]
        if wrong:
            raise Rejected(f"{', '.join(wrong)}: missing from the zip, or present twice")
        for name, facts in wanted.items():
            [member] = members[name]
            _require_size(name, member.file_size, facts.bytes or MOST_RATIO * file.stat().st_size)
            with archive.open(member) as stream, (staging / name).open("wb") as copy:
                shutil.copyfileobj(stream, copy)
    return {name: staging / name for name in wanted}


def _require_size(name: str, size: int, most: int) -> None:
    """Raise Rejected if a file is larger than a limit."""
    if size > most:
        raise Rejected(f"{name} is larger than {most:,} bytes; if that is right, declare its `bytes` in study.yaml")


def _received(source: DataSource, part: Path) -> int:
    """Number of bytes of an interrupted download that need not be downloaded again.

    Without a checksum, parts of different files on the server could pass for one. Each member of a zip has a checksum.
    """
    if part.exists() and (source.sha256 or source.files):
        return part.stat().st_size
    return 0


def download(source: DataSource, url: str, part: Path) -> None:
    """Download a source from its URL; resume an interrupted download if possible.

    Raises:
        Rejected: the file is larger than declared.
        UserError: the URL is invalid, or the server refuses.
        WorkFailed: the server cannot be reached or fails, or the connection breaks too often.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    most = 2 * source.bytes if source.bytes else MOST_BYTES
    with Bar(f"{part.stem}, MiB") as bar:
        for pause in (*PAUSES, None):
            try:
                problem = _receive(url, part, _received(source, part), most, bar)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"the connection failed: {_cause(error)}"
                if not part.exists():  # the server was never reached
                    break
            except requests.RequestException as error:
                answer = type(error).__name__
                if error.response is not None:
                    answer = f"{error.response.status_code} {error.response.reason}"
                raise UserError(answer, key=url) from None
            except ValueError as error:  # an invalid size, or URL of a redirect
                raise UserError(f"the server's answer is malformed: {error}", key=url) from None
            if not problem:
                return
            if pause is not None:
                say(f"{url}: {problem}; next try in {pause} s")
                time.sleep(pause)
    if received := _received(source, part):
        problem += f"; repeat the command to resume from {received:,} bytes"
    raise WorkFailed(f"{url}: {problem}")


class _Session(requests.Session):
    """Session that leaves a server only for one with a certificate, so for no service of this machine or network."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return the URL of a redirect, if any.

        Raises:
            UserError: the URL is neither https nor on the same server.
        """
        target = super().get_redirect_target(resp)
        parts = urlsplit(urljoin(resp.url, target))
        if parts.scheme != "https" and parts[:2] != urlsplit(resp.url)[:2]:
            raise UserError(f"the server redirects to {target}, which is not https", key=resp.url)
        return target


def _receive(url: str, part: Path, start: int, most: int, bar: Bar) -> str:
    """Write a file from a server, of which `part` has the first `start` bytes; return a problem that can pass, or "".

    Raises:
        Rejected: the file is larger than `most` bytes.
        UserError: the server sends something else.
        requests.HTTPError: the server refuses.
    """
    headers = {"Accept-Encoding": "identity"}  # without compression, lengths and ranges count bytes of the file
    if start:
        headers["Range"] = f"bytes={start}-"
    with _Session() as session, session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        answer = f"the server answers {response.status_code} {response.reason}"
        if start and response.status_code == 416:  # nothing is missing
            return ""
        if response.status_code == 429 or response.status_code >= 500:
            return answer
        response.raise_for_status()
        mode = "wb"
        if start and response.status_code == 206:
            mode = "ab"
        elif response.status_code != 200:
            raise UserError(f"{answer} instead of the file", key=url)
        size = int(response.headers.get("Content-Length", 0))
        with naming(part), part.open(mode) as stream:
            total = stream.tell() + size
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                _require_size(part.stem, stream.tell(), most)
                bar.update(stream.tell() >> 20, total >> 20)
    return ""


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
        problem = one_line(error)
        if isinstance(error, unreached) and not isinstance(error, absent):
            raise WorkFailed(f"{repository}: the hub cannot be reached: {problem}") from None
        raise UserError(problem, key=repository) from None
