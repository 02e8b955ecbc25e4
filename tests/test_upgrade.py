"""`make upgrade`: what its report says, and when the checkout changes. A real upgrade takes an environment of 8 GB, so
these tests use a small checkout with stand-ins for make and Python."""

import json
import subprocess
from pathlib import Path

import pytest
import snapshot
import upgrade

from qlora_recipes.base.errors import UserError

PYTHON = """#!/bin/sh
if [ "$2" = "$BROKEN" ] && grep -q 0.22.0 "$(dirname "$0")/../../requirements.lock"; then
    echo "ImportError: gone" >&2
    exit 1
fi
echo '{"a": {"loss": 1.5}, "b": {"loss": 2.0}}' > "$3"
"""
MAKEFILE = """
lock:
	@test -z "$$NO_LOCK" || { echo "no version of axolotl==$(AXOLOTL)" >&2; exit 1; }
	printf 'axolotl==$(AXOLOTL) ; marker\\ntorch==2.15\\n' > requirements.lock
setup:
	mkdir -p .venv/bin
	cp python .venv/bin/python
	printf '#!/bin/sh' > .venv/bin/recipe
	chmod +x .venv/bin/recipe
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an environment."""
    files = {
        "Makefile": MAKEFILE,
        "python": PYTHON,
        "pyproject.toml": 'dependencies = [\n    "axolotl[deepspeed]>=0.21,<0.22",\n    "axolotl-other",\n]\n',
        "requirements.lock": "axolotl==0.21.0 ; marker\ntorch==2.14\n",
        "recipes/axolotl.schema.json": "{}",
        ".gitignore": ".venv\nbuild\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["make", "--silent", "setup"], cwd=tmp_path, check=True)
    monkeypatch.setattr(upgrade, "ROOT", tmp_path)
    return tmp_path


def test_the_pin_and_the_lock_change_once_all_was_measured(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade.main("0.22.0") == 0
    assert (checkout / "requirements.lock").read_text() == "axolotl==0.22.0 ; marker\ntorch==2.15\n"
    assert '"axolotl[deepspeed]>=0.22.0,<0.23",\n    "axolotl-other"' in (checkout / "pyproject.toml").read_text()
    report = (checkout / "build/upgrade/0.22.0.md").read_text()
    assert capsys.readouterr().out.strip() == report.strip()
    assert "# From Axolotl 0.21.0 to 0.22.0" in report
    assert {"-torch: version: 2.14", "+torch: version: 2.15"} < {*report.splitlines()}
    assert report.count("unchanged: 2 items") == len(upgrade.PARTS)


def test_nothing_changes_where_a_part_could_not_be_measured(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (checkout / "pyproject.toml").read_text()
    monkeypatch.setenv("BROKEN", "plans")
    assert upgrade.main("0.22.0") == 1
    assert (checkout / "requirements.lock").read_text().startswith("axolotl==0.21.0")
    assert (checkout / "pyproject.toml").read_text() == before
    report = (checkout / "build/upgrade/0.22.0.md").read_text()
    assert "Planned memory" in report
    assert "ImportError: gone" in report
    assert report.count("unchanged: 2 items") == len(upgrade.PARTS) - 1


def test_a_release_without_a_lock_is_reported(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_LOCK", "1")
    assert upgrade.main("9.9.9") == 1
    report = (checkout / "build/upgrade/9.9.9.md").read_text()
    assert "axolotl==9.9.9" in report
    assert "unchanged" not in report
    assert (checkout / "requirements.lock").read_text().startswith("axolotl==0.21.0")


@pytest.mark.parametrize("version", ["", "0.22", "latest", "0.22.0rc1", "../0.22.0"])
def test_a_version_that_is_no_release_is_refused(checkout: Path, version: str) -> None:
    with pytest.raises(UserError, match=f"AXOLOTL={version}:"):
        upgrade.main(version)
    assert not (checkout / "build").exists()


def test_the_report_shows_changed_values_and_failed_items() -> None:
    old = {"x": {"a": 1, "b": None}, "y": {"a": 0.1 + 0.2}, "gone": {"a": 1}}
    new = {"x": {"a": 2, "b": None}, "y": {"a": 0.3}, "new": {"failed": "unknown"}}
    report = upgrade.section("", old, new).splitlines()
    shown = report[report.index("```diff") + 1 : report.index("```")]
    assert shown == ["-gone: a: 1", "-x: a: 1", "+new: failed: unknown", "+x: a: 2"]
    assert [reason.split()[-2:] for reason in upgrade.unmeasured(old, new)] == [["new:", "unknown"]]
    assert upgrade.unmeasured(old, old) == []


def test_a_key_of_the_schema_is_its_type_its_values_and_what_is_said_of_it() -> None:
    of_key = {
        "anyOf": [
            {"type": "string", "enum": ["a", "b"]},
            {"type": "array", "items": {"type": "integer"}},
            {"$ref": "#/$defs/Own"},
        ],
        "default": "a",
        "description": "of no matter",
        "deprecated": True,
    }
    assert json.loads(json.dumps(dict(snapshot.about(of_key)))) == {
        "type": "Own or list of integer or string",
        "takes a": True,
        "takes b": True,
        "default": "a",
        "deprecated": True,
    }
