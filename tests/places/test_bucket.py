"""Runs on machines that share no files with this one."""

import os
from pathlib import Path

import pytest
from run_folders import a_run

from qlora_recipes.base.errors import UserError
from qlora_recipes.configs.datafiles import DataFile
from qlora_recipes.places import bucket
from qlora_recipes.places.bucket import Bucket
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.runs.tasks import Command


def content(folder: Path) -> dict[str, str]:
    """The files below a folder, by path."""
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_folder_is_copied_as_far_as_it_changed(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "bucket"
    for name in ("run.json", "train.log", "jobs.json", ".git/config", "output/checkpoint-1/adapter"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    mirror = there / run.relative_to("/")
    one = Bucket(f"file://{there}")
    kept: bucket.Versions = {}
    one.upload(run, kept, last=False)
    assert content(mirror) == {"train.log": "train.log"}  # the others may just be written
    one.upload(run, kept)
    assert content(mirror).keys() == {"run.json", "train.log", "output/checkpoint-1/adapter"}
    (mirror / "run.json").write_text("as it was")
    (run / "output" / "checkpoint-1").rename(run / "output" / "checkpoint-2")
    (run / "output" / "checkpoint-2" / "adapter").write_text("new")
    one.upload(run, kept, last=False)
    assert "output/checkpoint-1/adapter" in content(mirror)  # until the next one is there
    one.upload(run, kept)
    (run / "train.log").unlink()
    one.upload(run, kept)
    assert content(mirror) == {"run.json": "as it was", "output/checkpoint-2/adapter": "new"}
    (mirror / "jobs.json").write_text("those of another")
    assert one.download(run, lambda file: file.name == "run.json")
    assert (content(run)["run.json"], content(run)["jobs.json"]) == ("as it was", "jobs.json")
    (mirror / "run.json").unlink()
    (run / "run.json").write_text("as it is.")
    kept = one.versions(run) | bucket.versions(run / "run.json")  # gone there behind our back
    (run / "run.json").unlink()
    one.upload(run, kept)
    assert content(mirror).keys() == {"output/checkpoint-2/adapter", "jobs.json"}
    assert not one.download(tmp_path / "nothing")


def test_scores_that_were_made_anew_here_stay(tmp_path: Path) -> None:
    run, there = RunDir(tmp_path / "run"), tmp_path / "bucket"
    mirror = there / run.path.relative_to("/")
    for folder in (mirror, run.path):
        folder.mkdir(parents=True)
        for name in ("run.json", "scores.json", "train.log"):
            (folder / name).write_text(f"{name} {folder.name}{'' if folder == mirror else ' made anew'}")
    os.utime(mirror / "run.json", (1, 1))
    os.utime(mirror / "scores.json", (1, 1))
    os.utime(run.path / "train.log", (1, 1))
    assert bucket.gather(f"file://{there}", run, ended=False)
    expected = {"run.json": "run.json run", "scores.json": "scores.json run made anew", "train.log": "train.log run"}
    assert content(run.path) == expected


def test_what_commands_read_is_what_is_here_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the other rows beside a prepared test file; not every word that happens to name something."""
    prepared, other = tmp_path / "prepared", tmp_path / "other"
    for file in ("train.jsonl", "test.jsonl", "test-subset-1.jsonl", "manifest.json", "notes.txt"):
        (prepared / file).parent.mkdir(exist_ok=True)
        (prepared / file).touch()
    for file in ("rows.jsonl", "zero.json", "private", "recipes/mine/study.yaml"):
        (other / file).parent.mkdir(parents=True, exist_ok=True)
        (other / file).touch()
    data = [DataFile(path=str(prepared / "train.jsonl"), sha256="x", bytes=0)]
    more = {"data": data, "test_data": str(prepared / "test.jsonl"), "set": {"deepspeed": str(other / "zero.json")}}
    folder = a_run(tmp_path / "runs", "haider2024/code-llama-7b", "a", 5.0, **more)
    monkeypatch.chdir(other)
    words = ["evaluate", str(folder.path), "--data", "rows.jsonl", "--model", "private", "--runs", "runs"]
    read = bucket.read_by([Command("evaluate", folder, words)])
    expected = [other / "rows.jsonl", other / "zero.json", prepared / "manifest.json"]
    expected += [prepared / f"{name}.jsonl" for name in ("test", "test-subset-1", "train")]
    assert read == sorted(expected)


def test_a_bucket_that_cannot_be_reached_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="bucket nowhere://a"):
        Bucket("nowhere://a")
    (tmp_path / "taken").write_text("a file")
    assert not bucket.gather(f"file://{tmp_path}/taken", RunDir(tmp_path / "run"), ended=True)
    assert not bucket.gather(f"file://{tmp_path}/empty", RunDir(tmp_path / "run"), ended=True)
    said = capsys.readouterr().err
    assert said.count("cannot be fetched") == 2 and "it has nothing of it" in said
