"""Broken environments, each found by `recipe doctor`, with a remedy."""

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from broken import FACTS, distribution, mounted, on_bus, program
from conftest import Recipe
from huggingface_hub import close_session, constants

from qlora_recipes.base import locks, paths
from qlora_recipes.data import hub
from qlora_recipes.doctor import gpu, machine, network, packages, probes
from qlora_recipes.doctor.line import in_shell

Break = Callable[[pytest.MonkeyPatch, Path], AbstractContextManager[None]]
TOKEN = "hf_QxW3vBn7mKzLp0aSdFgH"


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine may lack, and what takes long to ask."""
    monkeypatch.setattr(probes, "start", lambda: lambda: FACTS)
    monkeypatch.setattr(gpu, "_by_library", lambda: ([], "NVML Shared Library Not Found"))
    monkeypatch.setattr(gpu, "driver", partial(gpu.driver, tmp_path / "root"))
    monkeypatch.setattr(machine, "container", lambda: None)
    monkeypatch.setattr(machine, "REHEARSAL", 0.0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def lines(recipe: Recipe, code: int) -> dict[str, dict[str, str]]:
    done = recipe("doctor", "--json")
    assert done.returncode == code, done.stdout
    return {line["name"]: line for line in json.loads(done.stdout)}


def test_what_is_whole_is_found_so(recipe: Recipe) -> None:
    found = lines(recipe, 0)
    assert {name for name, line in found.items() if line["state"] == "wrong"} == set()
    expected = {"Python", "project", "lock", "Axolotl", "torch", "bitsandbytes", "runs", "cache", "containers"}
    assert expected <= {name for name, line in found.items() if line["state"] == "ok"}
    assert found["driver"]["state"] == found["hub"]["state"] == "note"
    assert "HF_HUB_OFFLINE" in found["hub"]["found"]


@contextmanager
def of(_: object) -> Iterator[None]:
    """Nothing to take back that monkeypatch does not."""
    yield


def another_package(name: str, number: str) -> Break:
    def apply(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[None]:
        distribution(folder / "site", name, number)
        patch.syspath_prepend(str(folder / "site"))
        return of(None)

    return apply


def no_driver(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[None]:
    return of(on_bus(folder / "root"))


def old_driver(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[None]:
    return of(program(folder / "bin" / "nvidia-smi", "echo 550.54.14, Tesla T4, 15360, 7.5"))


def cache_on(options: str) -> Break:
    def apply(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[None]:
        patch.setenv("XDG_CACHE_HOME", str(folder / "mounted"))
        return mounted(folder / "mounted", options)

    return apply


def lock_with(change: Callable[[str], str]) -> Break:
    def apply(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[None]:
        (folder / "requirements.lock").write_text(change(paths.LOCK.read_text()))
        return of(patch.setattr(paths, "LOCK", folder / "requirements.lock"))

    return apply


def no_locks(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[None]:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    return of(patch.setattr(locks.fcntl, "flock", flock))


def no_backend(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[None]:
    """As the probe reports it; test_probes.py has a real one."""
    reason = "OSError: libbitsandbytes_cpu.so: cannot open shared object file: No such file or directory"
    facts = FACTS | {"bitsandbytes": {"version": "0.50.2", "no_library": reason}}
    return of(patch.setattr(probes, "start", lambda: lambda: facts))


class Hub(BaseHTTPRequestHandler):
    """A hub that knows all models, and refuses to say whose a token is."""

    def do_GET(self) -> None:
        refused = self.path == "/api/whoami-v2"
        self.send_response(401 if refused else 200)
        for name, value in {"X-Error-Message": "Invalid user token.", "Content-Length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def expired_token(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        patch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(hub, "_answers", {})
        patch.setattr(network, "_models", lambda: ["owner/model"])
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield
        close_session()
        server.shutdown()


@contextmanager
def no_proxy(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(hub, "_answers", {})
    patch.setattr(network, "_models", lambda: ["owner/model"])
    patch.setenv("HTTPS_PROXY", "http://me:secret@127.0.0.1:9")
    patch.delenv("NO_PROXY", raising=False)
    close_session()
    yield
    close_session()


@pytest.mark.parametrize(
    ("broken", "name", "found", "command"),
    [
        (another_package("torch", "2.13.0"), "lock", f"torch is 2.13.0 instead of {version('torch')}", "make setup"),
        (another_package("axolotl", "0.20.1"), "Axolotl", "0.20.1; this project's recipes and schema", "make setup"),
        (lock_with(lambda text: f"{text}\nnowhere==1.0\n"), "lock", "nowhere is missing (==1.0)", "make setup"),
        (lock_with(lambda text: text.replace("\ntorch==", "\n# torch==")), "lock", "no entry for torch", "make lock"),
        (no_driver, "driver", "1 NVIDIA GPU on the bus, and no driver for it", "ubuntu-drivers install"),
        (old_driver, "driver", "550.54.14; torch 2.14.1+cu130 is built for CUDA 13.0, which needs 580", "CUDA=12.6"),
        (cache_on("ro"), "cache", "Read-only file system", "export XDG_CACHE_HOME="),
        (cache_on("size=512k"), "cache", "No space left on device", "export XDG_CACHE_HOME="),
        (no_locks, "cache", "does not lock files", "export XDG_CACHE_HOME="),
        (no_backend, "bitsandbytes", "without its own library: OSError: libbitsandbytes_cpu.so", "rm -r .venv"),
        (expired_token, "hub token", "the one in HF_TOKEN is refused (status 401)", "hf auth login"),
        (no_proxy, "proxy", "HTTPS_PROXY names does not answer: ", "unset HTTPS_PROXY"),
    ],
    ids=["another torch", "wrong Axolotl", "missing package", "missing lock entry", "no driver", "driver of 550",
         "read-only cache", "no space", "no locks", "bitsandbytes", "expired token", "proxy"],
)  # fmt: skip
def test_finds_what_is_broken_and_says_what_mends_it(
    broken: Break, name: str, found: str, command: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with broken(monkeypatch, tmp_path):
        all_lines = lines(recipe, 1)
    line = all_lines[name]
    assert (line["state"], found in line["found"], command in line["command"]) == ("wrong", True, True), line
    assert line["remedy"]
    also = {"Axolotl": {"lock"}, "cache": {"runs", "hub's cache"} if broken is no_locks else set()}
    wrong = {name for name, line in all_lines.items() if line["state"] == "wrong"}
    assert wrong == {name} | also.get(name, set())
    assert TOKEN not in str(all_lines) and "me:secret" not in str(all_lines)


def test_a_line_that_fails_leaves_the_others(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "optional", lambda: 1 / 0)
    found = lines(recipe, 1)
    assert found["optional packages"]["found"] == "cannot be looked at: ZeroDivisionError: division by zero"
    assert found["lock"]["state"] == found["containers"]["state"] == "ok"


def test_a_command_stands_in_one_piece_below_the_line_that_it_mends(recipe: Recipe, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "nvidia-smi", "echo 550.54.14, Tesla T4, 15360, 7.5")
    done = recipe("doctor")
    assert done.returncode == 1
    below = done.stdout.partition("\nwrong  driver: 550.54.14; torch ")[2].splitlines()
    assert below[1].strip() == "to do: install torch's build for CUDA 12.6, or a newer driver"
    assert below[2].strip() == f"cd {in_shell(paths.LOCK.parent)} && make setup CUDA=12.6"
    assert "wrong: 1" in done.stderr


def test_where_the_doctor_itself_cannot_be_imported_the_environment_is_made_anew(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "qlora_recipes.doctor.examination", None)
    monkeypatch.setattr(paths, "LOCK", tmp_path / "requirements.lock")
    paths.LOCK.touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".cuda").write_text("12.6\n")
    done = recipe("doctor")
    assert done.returncode == 1 and "rm -r .venv && make setup CUDA=12.6" in done.stderr


def test_no_line_has_names_of_this_machine_or_its_user(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home" / "mmuster"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    found = lines(recipe, 0)
    assert found["caches"]["found"].startswith("this project's empty (~/cache/qlora-recipes)")
    assert "mmuster" not in str(found)
