"""What the hub says, against a local server that answers like it."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe, config_with
from huggingface_hub import close_session, constants

from qlora_recipes.base import hub, yamlfiles
from qlora_recipes.checks import check
from qlora_recipes.configs.compose import Request, compose
from qlora_recipes.data.sample import usual_sample

CONFIG = {"model_type": "llama", "num_hidden_layers": 2}
# status, X-Error-Code and X-Error-Message, as the hub sends them
ANSWERS: dict[str, tuple[int, str, str]] = {
    "owner/open": (200, "", ""),
    "owner/gated": (403, "GatedRepo", "Access to model owner/gated is restricted. Visit its page to ask for access."),
    "owner/login": (401, "GatedRepo", "Access to model owner/login is restricted. Please log in."),
    "owner/private": (401, "RepoNotFound", "Repository not found"),
    "owner/none": (404, "RepoNotFound", "Repository not found"),
    "owner/mirrored": (404, "", ""),
    "owner/token": (401, "", "Invalid credentials in Authorization header"),
    "owner/rights": (403, "", "Please enable access to public gated repositories in your fine-grained token."),
    "owner/broken": (503, "", "Down for maintenance"),
}


class Server(ThreadingHTTPServer):
    """As much of the hub as is asked; of some models it never says anything."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.ended = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.strip("/")
        self.server.asked.append(path)
        if path.endswith("/resolve/main/config.json"):
            self._send(200, json.dumps(CONFIG).encode(), {"ETag": '"1"', "X-Repo-Commit": "c" * 40})
            return
        name = path.removeprefix("api/models/").removesuffix("/auth-check")
        if name not in ANSWERS:
            self.server.ended.wait()
            return
        status, code, message = ANSWERS[name]
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message} if code or message else {})

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A hub that huggingface_hub takes for the real one, with a token for it and an empty cache."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        hub.access("owner/open")  # the first request of a process imports much
        running.asked.clear()
        monkeypatch.setattr(hub, "_answers", {})
        monkeypatch.setattr(hub, "ANSWER_TIMEOUT", 1.0)
        yield running
        close_session()
        running.ended.set()
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("name", "access", "says"),
    [
        ("owner/open", "open", ""),
        ("owner/gated", "gated", "ask for access"),
        ("owner/login", "gated", "Please log in"),
        ("owner/private", "missing", "Repository not found"),
        ("owner/none", "missing", "Repository not found"),
        ("owner/token", "refused", "Invalid credentials"),
        ("owner/rights", "refused", "enable access to public gated repositories"),
        ("owner/broken", "unknown", "maintenance"),
        ("owner/never", "unknown", "no answer within 1 s"),
        ("owner/mirrored", "unknown", "status 404"),
    ],
)
def test_each_answer_of_the_hub_is_told_apart(server: Server, name: str, access: str, says: str) -> None:
    answer = hub.access(name)
    assert answer.access == access
    assert says in answer.says


def test_the_hub_is_asked_once_for_a_model_and_no_more_once_it_is_silent(server: Server) -> None:
    for _ in range(2):
        assert hub.access("owner/open").access == "open"
    assert server.asked == ["api/models/owner/open/auth-check"]
    assert hub.access("owner/never").access == "unknown"
    assert hub.access("owner/gated") == hub.access("owner/never")
    assert hub.access("owner/open").access == "open"  # it is known already
    assert len(server.asked) == 2


@pytest.mark.parametrize(("name", "says"), [("owner/none", "not found"), ("owner/never", "1 s")])
def test_a_plan_of_a_model_that_cannot_be_had_ends_soon(server: Server, recipe: Recipe, name: str, says: str) -> None:
    began = time.monotonic()
    done = recipe("plan", "haider2024/llama-2-7b", "--set", f"base_model={name}")
    assert (done.returncode, time.monotonic() - began < 30) == (2, True)
    assert "config.json" in done.stderr and name in done.stderr
    assert says in done.stderr


def own(place: Path, model: str) -> None:
    """Write a recipe for a model, whose data is there."""
    data = usual_sample()
    sets = {
        section: [{"path": str(data / f"{name}.jsonl"), "type": "alpaca"}]
        for section, name in (("datasets", "train"), ("test_datasets", "valid"))
    }
    change = {"base_model": model, "revision_of_model": None, "special_tokens": None, "fp16": False} | sets
    (place / "own.yaml").write_text(yamlfiles.write_yaml(config_with(change)))


@pytest.mark.parametrize(
    ("model", "level", "says"),
    [
        ("owner/gated", "warning", "is restricted"),
        ("owner/none", "error", "not found"),
    ],
)
def test_check_and_run_say_what_the_hub_refuses(
    server: Server, recipe: Recipe, tmp_path: Path, model: str, level: str, says: str
) -> None:
    own(tmp_path, model)
    (found,) = [line for line in recipe("check", "own.yaml").stdout.splitlines() if "no-access" in line]
    assert f"{level}: base_model: " in found and model in found and says in found
    ran = recipe("run", "own.yaml")
    assert ran.returncode == 2
    assert "error: base_model: " in ran.stderr and model in ran.stderr
    assert not (tmp_path / "runs").exists()
    assert server.asked == [f"api/models/{model}/auth-check"]  # one process: asked once


@pytest.mark.parametrize("model", ["codellama/CodeLlama-7b-hf", "./folder"])
def test_the_hub_is_not_asked_about_a_model_that_is_known_to_be_free(
    server: Server, recipe: Recipe, tmp_path: Path, model: str
) -> None:
    own(tmp_path, model)
    recipe("check", "own.yaml")
    assert server.asked == []


def test_a_silent_hub_is_no_reason_not_to_start(server: Server, tmp_path: Path) -> None:
    own(tmp_path, "owner/never")
    composed = compose(Request(str(tmp_path / "own.yaml")))
    assert [f for f in check.examine(composed, ask_hub=True).findings if f.rule == "no-access"] == []
    (only,) = [f for f in check.examine(composed, launching=True).findings if f.rule == "no-access"]
    assert only.level == "warning" and "owner/never" in only.problem
