"""`make upgrade`: what its report says, and when the checkout changes. A real upgrade takes an environment of 8 GB, so
these tests use a small checkout with stand-ins for make and Python."""

import json
import subprocess
from pathlib import Path

import pytest
import snapshot
import upgrade
from upgrade_report import Part

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
    assert "| torch | 2.14 | 2.15 |" in report
    assert report.count("unchanged: 2 items, 2 values") == len(upgrade.PARTS)


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


def test_the_same_change_of_several_items_is_one_row() -> None:
    old = {"x": {"a": 1, "b": None}, "y": {"a": 1}, "z": {"a": 1}}
    new = {"x": {"a": 2, "b": True}, "y": {"a": 2}, "z": {"a": 1}}
    assert Part("", old, new).differences() == [
        {"what": "a", "before": "1", "after": "2 (+100 %)", "where": "x, y"},
        {"what": "b", "before": "–", "after": "True", "where": "x"},
    ]
    assert not Part("", old, old).differences()


def test_what_came_and_went_is_shown_whole() -> None:
    old, new = {"gone": {"type": "text", "default": 1}}, {"new": {"type": "number"}}
    assert Part("", old, new).differences() == [
        {"what": "gone", "before": "text; default: 1", "after": "–", "where": ""},
        {"what": "new", "before": "–", "after": "number", "where": ""},
    ]


def test_an_item_that_failed_counts_as_not_measured() -> None:
    part = Part("", {"adamw": {"loss": 1.0}}, {"adamw": {"failed": "unknown"}})
    assert part.failed
    assert [line.split()[-2:] for line in part.failures()] == [["adamw:", "unknown"]]
    assert not part.differences()


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
