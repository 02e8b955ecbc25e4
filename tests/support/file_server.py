"""A file server whose behaviour tests set, and data that is declared to be there."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from qlora_recipes.base.files import Row
from qlora_recipes.data import fetch as fetching
from qlora_recipes.data.declaration import Data


@dataclass
class Server:
    """A file server: how it is to behave, and what it received."""

    url: str
    content: bytes | None = b""
    files: dict[str, bytes] = field(default_factory=dict)  # by the end of their paths; `content` is all else
    paths: list[str] = field(default_factory=list)
    ranges: bool = True
    breaks_after: list[int] = field(default_factory=list)  # bytes, each for one request
    answers: list[int] = field(default_factory=list)  # statuses instead of the file, each for one request
    error_code: str = ""  # of these, as a hub has them
    refusals: dict[str, tuple[int, str, str]] = field(default_factory=dict)  # by the end of a path, as `_refuse` takes
    silent: tuple[str, ...] = ()  # ends of paths that are never answered
    ended: threading.Event = field(default_factory=threading.Event)
    seen: list[dict[str, str]] = field(default_factory=list)  # the requests' headers
    posted: dict[str, bytes] = field(default_factory=dict)  # bodies by path
    sent: int = 0

    def asked_for(self) -> list[str | None]:
        return [headers.get("Range") for headers in self.seen]


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        orders: Server = self.server.orders
        orders.seen.append(dict(self.headers))
        orders.paths.append(self.path)
        if orders.answers:
            self._refuse(orders.answers.pop(0), orders.error_code)
            return
        if self.path.endswith(orders.silent):
            orders.ended.wait()
            return
        for name, refusal in orders.refusals.items():
            if self.path.endswith(name):
                self._refuse(*refusal)
                return
        content = orders.content
        for name, of_file in orders.files.items():
            if self.path.endswith(name):
                content = of_file
        if content is None:
            self._refuse(404, "EntryNotFound")
            return
        start, size = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and orders.ranges:
            start = int(asked[1])
            if start >= size:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(size - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)  # as a hub does
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start:]
        if orders.breaks_after:
            body = body[: orders.breaks_after.pop(0)]
        orders.sent += len(body)
        self.wfile.write(body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.orders.posted[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "PAUSES", (0,) * 5)
    monkeypatch.setattr(fetching, "CHUNK", 10_000)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.orders = orders = Server(f"http://127.0.0.1:{http.server_port}/files/Comment_Generation.zip")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield orders
    orders.ended.set()
    http.shutdown()
    http.server_close()
    thread.join()


@contextmanager
def as_hub(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Have huggingface_hub take a server for the hub, with an empty cache."""
    url_parts = re.sub("/files/.*", "", server.url)
    monkeypatch.setattr(constants, "ENDPOINT", url_parts)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url_parts + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    close_session()
    yield server
    close_session()


def data_of(sources: dict[str, Any]) -> Data:
    first, *_ = (file for name, source in sources.items() for file in source.get("files", [name]))
    about = {"key": "codereviewer", "name": "Reviews", "source": "https://zenodo.org/records/1", "licence": "CC"}
    return Data.model_validate(
        about | {"sources": sources, "fields": {"input": "a"}, "splits": {"train": {"from": first}}}
    )


def fetch_all(data: Data, out: Path) -> list[Row]:
    """Fetch all sources of a data set."""
    return fetching.fetch(data, out, data.sources)
