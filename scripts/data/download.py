"""Downloads a file over HTTP, and resumes what was interrupted."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import requests

from ..base.disks import naming
from ..base.errors import UserError, WorkFailed
from ..base.files import read_json, write_json
from ..base.progress import Bar, say

TIMEOUT = (15, 60)  # seconds: to connect, and without a byte
PAUSES = (2, 5, 15, 30, 60)  # seconds before each further try
CHUNK = 1 << 18  # bytes; at most this many are lost when a connection breaks


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


class Part:
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
        check_space(self.file.parent, (total or expected) - self.size, "the download")
        with naming(self.file), self.file.open("ab") as stream:
            for chunk in response.iter_content(CHUNK):
                stream.write(chunk)
                bar.update(stream.tell() >> 20, total >> 20)
        return "the connection broke off" if total and self.size != total else ""


def download(url: str, file: Path, expected: int, by_hand: str) -> Part:
    """The whole file at an address, resumed from what an earlier call downloaded, if that is of the same file.

    Args:
        url: the address.
        file: where it is to be in the end; until then it is beside that, as <file>.part.
        expected: about how many bytes it has, where the server does not say; 0 if that is not known.
        by_hand: what a user can do instead, for messages.

    Raises:
        UserError: the address is none, the server refuses, or there is too little space.
        WorkFailed: the server cannot be reached, fails, or breaks off too often.
    """
    shown = public(url)
    part = Part(file.with_name(f"{file.name}.part"), shown)
    part.file.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    reached = False
    with Bar(f"{file.name}, MiB") as bar:
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
                        problem = part.receive(response, expected, bar)
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
