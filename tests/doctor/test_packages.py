"""The lock beside what is installed, and the project's requirements where there is no lock."""

import sys
from pathlib import Path

import pytest
from broken import distribution

from qlora_recipes.base import paths
from qlora_recipes.doctor import packages


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock's file in the place of the project's."""
    monkeypatch.setattr(paths, "LOCK", tmp_path / "requirements.lock")
    monkeypatch.setattr(packages, "_own", lambda: iter(()))
    return tmp_path / "requirements.lock"


def test_markers_are_evaluated_and_hashes_skipped(lock: Path) -> None:
    lock.write_text(
        "# by uv\n"
        "orjson==0.0.1 ; sys_platform == 'linux' \\\n    --hash=sha256:00\n"
        "gone==1.0 ; python_full_version < '3.0' \\\n    --hash=sha256:00\n"
        "Also_Gone==1.0 \\\n    --hash=sha256:00\n"
    )
    line = packages.lock()
    assert line.state == "wrong" and line.found.startswith("orjson is ")
    assert line.found.endswith(" instead of 0.0.1, Also_Gone is missing (==1.0)")


def test_of_many_packages_the_first_are_named(lock: Path) -> None:
    lock.write_text("".join(f"gone{number}==1\n" for number in range(8)))
    assert packages.lock().found.endswith("gone4 is missing (==1), and 3 more")


def test_a_build_of_torch_for_another_cuda_brings_its_own_libraries(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.write_text("torch==2.14.1\nnvidia-nothing-cu13==13.0\ntriton==0.1\nnvidia-ml-py==0.1\n")
    distribution(tmp_path / "site", "torch", "2.14.1+cu126")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    line = packages.lock()
    assert "nvidia-ml-py is " in line.found and "cu13" not in line.found
    assert "triton is " in line.found  # which make keeps at the lock's version
    lock.write_text("torch==2.14.1\nnvidia-nothing-cu13==13.0\n")
    line = packages.lock()
    assert line.state == "ok" and "as torch's is cu126" in line.found


@pytest.mark.parametrize("content", ["", "<<<<<<< ours\n", "torch == ==\n"])
def test_a_damaged_lock_is_restored(lock: Path, content: str) -> None:
    lock.write_text(content)
    line = packages.lock()
    assert line.state == "wrong" and line.command.endswith("git checkout requirements.lock && make setup")


def test_a_wheel_is_judged_by_what_it_requires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "LOCK", tmp_path / "requirements.lock")
    assert packages.lock().state == "note"
    distribution(tmp_path / "site", "typer", "0.1")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    line = packages.lock()
    assert line.state == "wrong" and "typer is 0.1 instead of >=0.20" in line.found
    assert line.command == "pip install 'typer>=0.20'"


def test_the_command_axolotl_stands_beside_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.axolotl({}).state == "ok"
    assert "cannot be imported: ImportError" in packages.axolotl({"error": "ImportError: of torch"}).found
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "no command axolotl" in packages.axolotl({}).found
