"""Runs on a small disk that fills: messages, states, and files."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Recipe

from qlora_recipes.base.files import sha256
from qlora_recipes.evaluate.scores_file import ADAPTER
from qlora_recipes.run.rundir import all_runs

NAME = "haider2024/code-llama-7b"
FILES = {"config.yaml", "run.json", "metrics.jsonl", "train.log", "output", ".lock"}


@pytest.fixture
def disk(tmp_path: Path, with_fake_axolotl: Recipe, programs: Callable[[str], None]) -> Iterator[Path]:
    """A disk with room for a part of a run, and an Axolotl that trains nothing."""
    programs("disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    if _mount(folder, "-o", "size=400k", "-t", "tmpfs", "tmpfs").returncode:
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(folder: Path, *options: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["mount", *options, folder], capture_output=True)


def fill(folder: Path, but: int = 0) -> None:
    """Leave fewer bytes free than one block more than `but`."""
    with (folder / "ballast").open("ab", buffering=0) as stream:
        block = os.statvfs(folder).f_frsize
        while (blocks := (os.statvfs(folder).f_bavail * block - but) // block) > 0:
            stream.write(bytes(blocks * block))


def test_a_run_that_fills_its_disk_has_failed_and_goes_on_to_the_same_end(disk, recipe, tmp_path, tiny_profile):
    words = ("run", NAME, "--profile", tiny_profile)
    recipe.ok("--runs", "roomy", *words)
    done = recipe("--runs", disk, *words)
    (run,) = all_runs(disk)
    record = run.read()
    assert record.state == "failed"
    (launch,) = record.launches
    assert launch.exit_code == 1
    assert launch.full_disk
    assert Path(launch.full_disk).is_relative_to(run.path)
    message = f"recipe: {run.path}: failed, no space left in {launch.full_disk}; free some space, then "
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{message}`recipe resume {run.path}` continues it"
    assert f"no space left in {launch.full_disk}" in recipe("--runs", disk, "results", "--json").stdout
    for room in (40_000, 0):
        fill(disk, room)
        again = recipe("resume", run.path)
        assert again.returncode == 1
        assert again.stderr.splitlines()[-1].startswith(f"recipe: {run.path}: ")
        assert run.read() == record
    assert {path.name for path in run.path.iterdir()} == FILES
    assert _mount(disk, "-o", "remount,size=4m").returncode == 0
    resumed = recipe.ok("resume", run.path)
    assert "checkpoint-" in resumed.stderr  # half of one is not what it goes on from
    (undisturbed,) = all_runs(tmp_path / "roomy")
    assert sha256(run.output / ADAPTER) == sha256(undisturbed.output / ADAPTER)
    assert run.read().state == "finished"
