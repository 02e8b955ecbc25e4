"""Downloads files over HTTP and from the hub; an interrupted download is resumed."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import requests

from ..base.errors import UserError, WorkFailed
from ..base.files import naming, read_json, write_json
from ..base.hub import limit_waiting
from ..base.progress import Bar, say
from .declaration import Source

TIMEOUT = (15, 60)  # seconds: to connect, and without a byte
PAUSES = (2, 5, 15, 30, 60)  # seconds before each further try
CHUNK = 1 << 18  # bytes; at most this many are lost when a connection breaks
_BATCH = 1000  # rows of a data set that are in memory at once


def public(url: str) -> str:
    """A URL without name, password and query, any of which can be secret; a path is unchanged."""
    return re.sub(r"(://)([^/?#:]*:(?!\d+/)[^?#]*@|[^/?#]*@)?([^?#]*).*", r"\1\3", url)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError where a disk has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {what} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "make room, or name another folder with --out"
        )


def version_file(part: Path) -> Path:
    """The file with the address and version of a file whose download has begun."""
    return part.with_name(f"{part.name}.json")


def download(url: str, part: Path, expected: int, by_hand: str) -> None:
    """Download the file at an address, resuming an earlier call's download of the same version.

    Args:
        url: the address.
        part: the file to write.
        expected: about how many bytes it has, where the server does not say; 0 if that is not known.
        by_hand: what a user can do instead, for messages.

    Raises:
        UserError: the address is invalid, the server refuses, or there is too little space.
        WorkFailed: the server cannot be reached, fails, or breaks off too often.
    """
    shown = public(url)
    part.parent.mkdir(parents=True, exist_ok=True)
    with Bar(f"{part.stem}, MiB") as bar:
        for pause in (*PAUSES, None):
            try:
                problem = _receive(url, part, expected, bar)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"the connection failed: {_cause(error)}"
                if not version_file(part).exists():  # the server was never reached
                    raise WorkFailed(f"{shown}: {problem}; {by_hand}") from None
            except requests.RequestException as error:  # whose text can show a password
                answer = f"{error.response.status_code} {error.response.reason}" if error.response is not None else ""
                raise UserError(
                    f"{shown}: {answer or type(error).__name__}; name another address, or {by_hand}"
                ) from None
            if not problem:
                return
            if pause is not None:
                say(f"{shown}: {problem}; next try in {pause} s")
                time.sleep(pause)
    there = part.stat().st_size if part.exists() else 0
    raise WorkFailed(f"{shown}: {problem}; run it again to resume from {there:,} bytes, or {by_hand}")


def _receive(url: str, part: Path, expected: int, bar: Bar) -> str:
    """Append what a server sends; the reason why the file is not whole yet, or nothing if it is.

    Beside the file are its address and version, by which another call resumes.
    """
    about = read_json(version_file(part))
    size = part.stat().st_size if part.exists() and about.get("url") == public(url) and about.get("version") else 0
    if size and size == about["bytes"]:
        return ""
    headers = {"Accept-Encoding": "identity"}  # so that lengths and ranges are the file's own
    if size:
        headers |= {"Range": f"bytes={size}-", "If-Range": about["version"]}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        etag = response.headers.get("ETag", "W/")
        version = response.headers.get("Last-Modified") if etag.startswith("W/") else etag  # If-Range takes no weak one
        rest = rf"bytes {size}-\d+/{about.get('bytes') or '.+'}"
        continues = re.fullmatch(rest, response.headers.get("Content-Range", "")) and version in (
            None,
            about["version"],
        )
        if response.status_code == 416 or (response.status_code == 206 and not continues):
            part.unlink()
            return "the file on the server has changed"
        if response.status_code == 429 or response.status_code >= 500:
            return f"the server answers {response.status_code} {response.reason}"
        response.raise_for_status()
        if response.status_code != 206:
            if size:
                say(f"{part}: starting over; the server has another file now, or cannot send a part of it")
            part.unlink(missing_ok=True)  # before the new version is recorded, which would else seem to be its own
            about = {"url": public(url), "version": version, "bytes": int(response.headers.get("Content-Length", 0))}
            write_json(version_file(part), about)
            size = 0
        check_space(part.parent, (about["bytes"] or expected) - size, "the download")
        with naming(part), part.open("ab") as stream:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                bar.update(stream.tell() >> 20, about["bytes"] >> 20)
    return "the connection broke off" if about["bytes"] and part.stat().st_size != about["bytes"] else ""


def _cause(error: BaseException) -> str:
    """The cause of an error from requests, whose own text is long and repeats the address."""
    while error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)


def hub_file(source: Source, file: str, by_hand: str) -> Path:
    """A file of a hub's repository, in the hub's cache.

    Raises:
        UserError: the hub has no such file, or refuses it.
        WorkFailed: the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors(source, by_hand):
        return Path(hf_hub_download(str(source.hub), file, revision=source.revision))


def write_dataset(source: Source, copy: Path | None, file: Path, by_hand: str) -> int:
    """Write a split of a data set as JSON lines; the number of its rows.

    Args:
        copy: a folder with a copy of the repository, to read instead of the hub.

    Raises:
        UserError: the hub has no such data set, or refuses it.
        WorkFailed: the hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    where, revision = (str(copy), None) if copy else (source.hub, source.revision)
    with _hub_errors(source, by_hand):
        rows = datasets.load_dataset(where, source.config, split=source.split, revision=revision)
    with Bar(f"{file.name}, rows", len(rows)) as bar, file.open("wb") as stream:
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            for values in zip(*batch.values(), strict=True):
                stream.write(orjson.dumps(dict(zip(batch, values, strict=True)), default=str) + b"\n")
            bar.update(min(start + _BATCH, len(rows)))
    return len(rows)


@contextmanager
def _hub_errors(source: Source, by_hand: str) -> Iterator[None]:
    """Report errors of the hub's clients with the repository."""
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError
    from huggingface_hub import errors

    limit_waiting()
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    try:
        yield
    except (*absent, DatasetsError) as error:
        raise UserError(f"{source.hub}: {_one_line(error)}; {by_hand}") from None
    except (errors.LocalEntryNotFoundError, ConnectionError, HTTPError) as error:
        raise WorkFailed(f"{source.hub}: the hub cannot be reached: {_one_line(error)}; {by_hand}") from None
    except ValueError as error:  # of datasets, for an unknown split or configuration
        raise UserError(f"{source.hub}: {_one_line(error)}; {by_hand}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
