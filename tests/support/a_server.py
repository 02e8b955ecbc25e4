"""A server with as much of OpenAI's protocol as tests need, which fails on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any] | None
"""Status and content, as JSON unless it is bytes; None to close the connection without an answer."""


class AServer(ThreadingHTTPServer):
    """Serves the model `m`; `reply` makes its answers to POST, `others` and `models` are those to GET."""

    daemon_threads = True

    def __init__(self, reply: Callable[[dict[str, Any]], Reply], port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.reply = reply
        self.requests: list[dict[str, Any]] = []  # bodies, each with its headers
        self.asked: list[dict[str, str]] = []  # headers of each GET
        self.models: Reply = (200, {"data": [{"id": "m", "owned_by": "vllm"}, {"id": "another"}]})
        self.others: dict[str, Reply] = {}  # answers to GET by path
        self.headers = {"Retry-After-Ms": "10"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that is gone."""


class _Handler(BaseHTTPRequestHandler):
    server: AServer

    def do_GET(self) -> None:
        self.server.asked.append(self._lowered())
        self._answer(self.server.others.get(self.path, self.server.models))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body | {"headers": self._lowered()})
        self._answer(self.server.reply(body | {"path": self.path}))

    def _lowered(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def _answer(self, reply: Reply) -> None:
        if reply is None:
            return
        content = reply[1] if isinstance(reply[1], bytes) else json.dumps(reply[1]).encode()
        self.send_response(reply[0])
        for name, value in {"Content-Length": str(len(content)), **self.server.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Leave the test's output alone."""


def completed(text: str, reason: str | None = "stop", **more: Any) -> Reply:
    return 200, {"choices": [{"text": text, "finish_reason": reason} | more]}


@contextmanager
def serving(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[AServer]:
    with AServer(reply) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
