"""Runs on machines that share no files with this one."""

import os
import shutil
from pathlib import Path

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.places import bucket
from qlora_recipes.places.bucket import Bucket
from qlora_recipes.runs.rundir import RunDir


def content(folder: Path) -> dict[str, str]:
    """The files below a folder, by path."""
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_folder_is_copied_as_far_as_it_changed(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "bucket"
    (run / "output" / "checkpoint-1").mkdir(parents=True)
    (run / ".lock").touch()
    for name in ("run.json", "jobs.json", "output/checkpoint-1/adapter"):
        (run / name).write_text(name)
    kept = there / run.relative_to("/")
    one = Bucket(f"file://{there}")
    former = one.upload(run, last=False)
    assert content(kept) == {"run.json": "run.json"}  # the checkpoint may just be written
    former = one.upload(run, former)
    assert content(kept).keys() == {"run.json", "output/checkpoint-1/adapter"}
    (kept / "run.json").write_text("as it was")
    shutil.rmtree(run / "output")
    one.upload(run, former)
    assert content(kept) == {"run.json": "as it was"}  # not copied again, and what is gone is gone
    (kept / "jobs.json").write_text("those of another")
    one.download(run)
    assert content(run) == {".lock": "", "jobs.json": "jobs.json", "run.json": "as it was"}
    mine = run / "run.json"
    stat = mine.stat()
    mine.write_text("as it is.")
    os.utime(mine, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    one.download(run)
    assert mine.read_text() == "as it is."  # size and time are what says that a file differs


def test_a_bucket_that_cannot_be_reached_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="bucket nowhere://a"):
        Bucket("nowhere://a")
    (tmp_path / "taken").write_text("a file")
    assert not bucket.gather(f"file://{tmp_path}/taken", RunDir(tmp_path / "run"), ended=True)
    assert "cannot be fetched" in capsys.readouterr().err
