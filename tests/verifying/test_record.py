"""Records of verifications: how lines are judged, what a record may say, and the table of those that were handed in."""

import getpass
import platform
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes.base import paths
from qlora_recipes.base.errors import UserError
from qlora_recipes.data import verified
from qlora_recipes.data.verified import Hardware, Outcome, Record
from qlora_recipes.verifying.bench import anonymous
from qlora_recipes.writing import render

ROOT = Path(__file__).parents[2]
T4 = {"name": "Tesla T4", "memory_gib": 15.0, "compute_capability": "7.5", "driver": "580.1"}


def a_record(*lines: Outcome, **changes: Any) -> Record:
    hardware = Hardware(gpus=[T4], cpu="a processor", cores=8, memory_gib=32)
    content = {"made": "2026-01-01", "quick": False, "seconds": 6.0, "packages": {"axolotl": "0.21.0"}, "revision": "a"}
    return Record(**content | changes, hardware=hardware, lines=list(lines))


def a_line(verdict: str, **changes: Any) -> Outcome:
    about = {"line": "memory", "what": "a with b", "bound": 0.02, "means": "plans are wrong", "note": "why"}
    return Outcome(**about | {"measured": 101, "expected": 100} | changes, verdict=verdict)


@pytest.mark.parametrize(
    ("measured", "expected", "bound", "verdict"),
    [
        (101, 100, 0.02, "passed"),
        (98, 100, 0.02, "passed"),
        (103, 100, 0.02, "failed"),
        (97, 100, 0.02, "failed"),
        (0, None, 0, "passed"),
        (1e-12, None, 0, "failed"),
        (0, 0, 0, "passed"),
        (1, 0, 0.5, "failed"),
        (None, 100, 0.02, "failed"),
        (None, None, 1, "failed"),
        (float("nan"), 100, 0.02, "failed"),
        (float("nan"), None, 1, "failed"),
        (float("inf"), None, 1, "failed"),
    ],
)
def test_a_figure_passes_within_its_bound(
    measured: float | None, expected: float | None, bound: float, verdict: str
) -> None:
    assert verified.judge(measured, expected, bound) == verdict


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = a_record(a_line("passed"), a_line("failed", measured=None), a_line("unverified", measured=None))
    (file := tmp_path / "t4.json").write_text(record.model_dump_json())
    assert verified.read(file) == record


def test_a_record_whose_verdict_is_not_that_of_its_figures_is_refused(tmp_path: Path) -> None:
    text = a_record(a_line("passed"), a_line("passed")).model_dump_json()
    for old, new, says in (
        ('"measured":101.0', '"measured":150.0', "its figures do not make it passed"),
        ('"verdict":"passed"', '"verdict":"failed"', "its figures do not make it failed"),
        ('"verdict":"passed"', '"verdict":"good"', "lines.0.verdict"),
        ('"note":"why","means"', '"note":"why","user":"me","means"', "lines.0.user: Extra inputs"),
        ('"version":1', '"version":2', "version"),
    ):
        assert old in text
        (file := tmp_path / "t4.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=says):
            verified.read(file)
    with pytest.raises(ValueError, match="does not say why"):
        a_line("unverified", note="")


def test_the_table_names_the_machine_and_counts_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verified.table(tmp_path) == []
    for name, made in (("b", "2026-01-02"), ("a", "2026-02-01")):
        record = a_record(a_line("passed"), a_line("passed"), a_line("unverified"), made=made, quick=name == "b")
        (tmp_path / f"{name}.json").write_text(record.model_dump_json())
    first, second = verified.table(tmp_path)
    assert (first["file"], second["file"]) == ("b.json", "a.json")
    assert first["machine"] == "Tesla T4"
    assert (first["passed"], first["failed"], first["unverified"]) == (2, 0, 1)
    monkeypatch.setattr(verified, "FOLDER", tmp_path)
    readme = render.rendered()[render.README]
    assert "| Tesla T4 | 2026-01-02 | 0.21.0 | 2 | 0 | 1 | [b.json](verified/b.json), quick |" in readme
    assert "None yet" not in readme


def test_what_is_shipped_says_what_was_verified() -> None:
    none = not verified.table()
    assert ("None yet." in (paths.RECIPES / render.README).read_text()) == none
    assert ("so far: none yet" in " ".join((ROOT / "README.md").read_text().split())) == none


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("No such file: '/srv/me/runs/x/config.yaml'", "No such file: '…'"),
        ("/a/b/c: Axolotl failed; ~/x/y.log says why", "…: Axolotl failed; … says why"),
        ("at ../data/my-rows.jsonl and runs/mine/x", "at … and …"),
        ("1.5 GiB / 2 of 16 GB", "1.5 GiB / 2 of 16 GB"),
        ("CUDA out of memory. Tried to allocate 2.00 MiB", "CUDA out of memory. Tried to allocate 2.00 MiB"),
        (f"{getpass.getuser()} on {platform.node()} in {Path.home()}", "… on … in …"),
    ],
)
def test_messages_lose_folders_and_names(said: str, kept: str) -> None:
    assert anonymous(said) == kept
