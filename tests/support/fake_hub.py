"""A local hub with jobs and buckets, for huggingface_hub's own client.

Contents of buckets go through hf_xet, whose library stores them in a local folder if the hub says so (`local://`).
A job does nothing until `Hub.work` carries out its command. The container is a folder for HOME, a PATH that begins with
a fake `uv`, and the job's volume in place of its mount path. The client's working folder has another name meanwhile,
because the job writes to the same paths.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
from huggingface_hub import HfApi, close_session, constants

TOKEN = "hf_" + "Of3a4nn5" * 3
FLAVORS = [
    ("cpu-basic", None, "", "", 0.01),
    ("t4-small", "T4", "1", "16 GB", 0.40),
    ("l4x1", "L4", "1", "24 GB", 0.80),
    ("a10g-small", "A10G", "1", "24 GB", 1.00),
    ("a10g-largex2", "A10G", "2", "48 GB", 3.00),
    ("a100-large", "A100", "1", "80 GB", 2.50),
]
UV = """#!{python}
import pathlib, sys, venv, zipfile
words = sys.argv[1:]
if words[0] == "venv":
    folder = pathlib.Path(words[-1])
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "all.pth").write_text("import site; site.addsitedir({packages!r})\\n")
    axolotl = folder / "bin" / "axolotl"
    axolotl.write_text(f"#!{{folder / 'bin' / 'python'}}\\n" + pathlib.Path({axolotl!r}).read_text())
    axolotl.chmod(0o755)
elif words[1] == "sync":
    assert "--require-hashes" in words
    assert "axolotl==" in pathlib.Path(words[-1]).read_text()
else:
    folder = pathlib.Path(words[words.index("--python") + 1])
    (packages,) = folder.glob("lib/python*/site-packages")
    assert "--no-deps" in words
    zipfile.ZipFile(words[-1]).extractall(packages)
    recipe = folder / "bin" / "recipe"
    entry = "import sys; from qlora_recipes.cli import main; sys.exit(main())"
    recipe.write_text(f"#!{{folder / 'bin' / 'python'}}\\n{{entry}}\\n")
    recipe.chmod(0o755)
"""


@dataclass
class Hub:
    """State of the hub."""

    folder: Path
    url: str = ""
    credits: float = 10
    allows: bool = True  # whether the token may run jobs
    private: bool = True
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path in the bucket
    asked: list[str] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)

    @property
    def job(self) -> dict[str, Any]:
        """The newest job."""
        return self.jobs[list(self.jobs)[-1]]

    def set(self, stage: str, message: str | None = None) -> None:
        self.job["status"] = {"stage": stage, "message": message}

    def work(self, client: Path, recipe: Path, until: Callable[[Path], object] = lambda _: False, **env: str) -> int:
        """Carry out the newest job's command and return its exit code.

        Args:
            client: working folder of the client.
            recipe: the command with the fake Axolotl.
            until: condition on the volume in which the job is killed.
            env: environment variables of the image.
        """
        container = self.folder / f"container-{len(self.jobs)}"
        (container / "bin").mkdir(parents=True)
        _write_uv(container / "bin" / "uv", recipe)
        (volume,) = self.job["volumes"]
        address, mount = f"hf://buckets/{volume['source']}/{volume['path']}", container / "mount"
        hub = HfApi(self.url, token=TOKEN)
        hub.sync_bucket(address, str(mount), quiet=True)
        environment = env | self.job["environment"] | self.job["secrets"]
        environment |= {"HOME": str(container), "JOB_ID": self.job["id"], "HF_HUB_OFFLINE": "1"}
        environment |= {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}  # has the rehearsal's model
        environment["PATH"] = f"{container / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = [word.replace(volume["mountPath"], str(mount)) for word in self.job["command"]]
        self.set("RUNNING")
        away = client.rename(client.with_name(f"{client.name}-away"))
        with (container / "log").open("w") as log:
            streams = {"stdout": log, "stderr": log}
            process = subprocess.Popen(command, cwd=container, env=environment, process_group=0, **streams)
            while process.poll() is None and not until(mount):
                time.sleep(0.02)
            killed = process.poll() is None
            if killed:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if client.exists():
            client.rename(container / "disk")
        away.rename(client)
        hub.sync_bucket(str(mount), address, delete=True, quiet=True)
        self.logs[self.job["id"]] = (container / "log").read_text()
        self.set("ERROR" if code else "COMPLETED", "Job timeout" if killed else None)
        return code


def _write_uv(file: Path, recipe: Path) -> None:
    """Write a program that does what the job asks of uv, with the packages of this environment."""
    (packages,) = recipe.parents[1].glob("lib/python*/site-packages")
    axolotl = recipe.with_name("axolotl")
    file.write_text(UV.format(python=sys.executable, packages=str(packages), axolotl=str(axolotl)))
    file.chmod(0o755)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        hub.bodies.append(body.decode(errors="replace"))
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/whoami-v2":
            self._answer({"name": "ann", "type": "user"})
        elif path.startswith("/api/jobs"):
            self._jobs(hub, path.split("/")[3:], body)
        else:
            self._buckets(hub, path, body)

    do_POST = do_HEAD = do_GET

    def _jobs(self, hub: Hub, words: list[str], body: bytes) -> None:
        if words == ["hardware"]:
            self._answer([_hardware(*flavor) for flavor in FLAVORS])
        elif not hub.allows:
            self._answer({"error": "the token lacks the permission job.write"}, 403)
        elif len(words) == 1:
            if hub.credits <= 0:
                self._answer({"error": "Pre-paid credit balance is insufficient"}, 402)
                return
            id_ = f"{len(hub.jobs):024x}"
            owner = {"id": "1", "name": words[0], "type": "user"}
            hub.jobs[id_] = orjson.loads(body) | {"id": id_, "owner": owner, "createdAt": _now()}
            hub.set("SCHEDULING")
            self._answer(_shown(hub.job))
        elif words[-1] == "cancel":
            hub.set("CANCELED")
            self._answer(_shown(hub.jobs[words[1]]))
        elif words[-1] == "logs":
            lines = hub.logs.get(words[1], "").splitlines()
            events = [b"data: " + orjson.dumps({"data": line, "timestamp": _now()}) + b"\n\n" for line in lines]
            self._send(b"".join(events), 200, {"Content-Type": "text/event-stream"})
        else:
            self._answer(_shown(hub.jobs[words[1]]))

    def _buckets(self, hub: Hub, path: str, body: bytes) -> None:
        if path.endswith("-token"):
            address, expires = f"local://{hub.folder / 'cas'}", int(time.time()) + 3600
            self._answer({"casUrl": address, "exp": expires, "accessToken": "short-lived"})
        elif path.endswith("/batch"):
            for line in body.splitlines():
                change = orjson.loads(line)
                if change["type"] == "deleteFile":
                    hub.files.pop(change["path"], None)
                else:
                    hub.files[change["path"]] = change
            self._answer({})
        elif "/tree/" in path:
            prefix = path.partition("/tree/")[2] + "/"
            self._answer([_file(hub, name) for name in sorted(hub.files) if name.startswith(prefix)])
        elif "/resolve/" in path:
            name = path.partition("/resolve/")[2]
            bucket = path.removeprefix("/buckets/").partition("/resolve/")[0]
            headers = {"X-Xet-Hash": hub.files[name]["xetHash"], "X-Linked-Size": str(_size(hub, name))}
            headers["X-Xet-Refresh-Route"] = f"{hub.url}/api/buckets/{bucket}/xet-read-token"
            self._send(b"", 200, headers)
        elif path.startswith("/api/buckets/"):
            bucket = path.removeprefix("/api/buckets/")
            about = {"id": bucket, "private": hub.private, "createdAt": _now(), "size": 0, "totalFiles": len(hub.files)}
            self._answer(about | {"url": f"{hub.url}/buckets/{bucket}"})
        else:
            self._answer({}, 404)

    def _answer(self, content: Any, status: int = 200) -> None:
        self._send(orjson.dumps(content), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _shown(job: dict[str, Any]) -> dict[str, Any]:
    """A job as the hub shows it: of secrets only the names."""
    return job | {"secrets": dict.fromkeys(job.get("secrets", {}), "")}


def _hardware(name: str, model: str | None, quantity: str, memory: str, dollars: float) -> dict[str, Any]:
    accelerator = {"type": "gpu", "model": model, "quantity": quantity, "vram": memory, "manufacturer": "Nvidia"}
    return {
        "name": name,
        "prettyName": name,
        "cpu": "4 vCPU",
        "ram": "15 GB",
        "accelerator": accelerator if model else None,
        "unitCostMicroUSD": round(dollars / 60 * 1e6),
        "unitCostUSD": dollars / 60,
        "unitLabel": "minute",
    }


def _file(hub: Hub, name: str) -> dict[str, Any]:
    change = hub.files[name]
    written = datetime.fromtimestamp(change["mtime"] / 1000, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "file", "path": name, "size": _size(hub, name), "xetHash": change["xetHash"], "mtime": written}


def _size(hub: Hub, name: str) -> int:
    """Size of a file, which only the storage has; asked for once."""
    change = hub.files[name]
    if "size" not in change:
        change["size"] = len(content(hub, name))
    size: int = change["size"]
    return size


def content(hub: Hub, name: str) -> bytes:
    from hf_xet import XetFileInfo
    from huggingface_hub.utils._xet import get_xet_session

    copy = hub.folder / "copy"
    route = f"{hub.url}/api/buckets/a/b/xet-read-token"
    with get_xet_session().new_file_download_group(token_refresh_url=route, token_refresh_headers={}) as group:
        group.start_download_file(XetFileInfo(hub.files[name]["xetHash"]), str(copy))
    return copy.read_bytes()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, with a token that it accepts."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.hub = hub = Hub(folder, f"http://127.0.0.1:{http.server_port}")
    (folder / "cas").mkdir(parents=True)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield hub
    close_session()
    http.shutdown()
    http.server_close()
    thread.join()
