"""Disks that fill, each a small one of its own: what is said, the state of runs, and what is left behind."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Recipe

from qlora_recipes.base.files import sha256
from qlora_recipes.run.rundir import all_runs

NAME = "haider2024/code-llama-7b"
KEPT = {"config.yaml", "run.json", "metrics.jsonl", "train.log", "output", ".lock"}


@pytest.fixture
def disk(tmp_path: Path, with_fake_axolotl: Recipe) -> Iterator[Path]:
    """A disk with room for a part of a run, and an Axolotl that trains nothing."""
    (folder := tmp_path / "disk").mkdir()
    if _mount(folder, "-o", "size=400k", "-t", "tmpfs", "tmpfs").returncode:
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(folder: Path, *options: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["mount", *options, folder], capture_output=True)


def fill(folder: Path, but: int = 0) -> None:
    """Leave fewer bytes free than one block more than `but`."""
    with (folder / "ballast").open("ab", buffering=0) as stream:
        while (room := os.statvfs(folder).f_bavail * (block := os.statvfs(folder).f_frsize) - but) >= block:
            stream.write(bytes(room // block * block))


def test_a_run_that_fills_its_disk_has_failed_and_goes_on_to_the_same_end(disk, recipe, tmp_path, tiny_profile):
    words = ("run", NAME, "--profile", tiny_profile)
    recipe.ok("--runs", "roomy", *words)
    done = recipe("--runs", disk, *words)
    (run,) = all_runs(disk)
    assert done.returncode == 1 and f"`recipe resume {run.path}`" in done.stderr.splitlines()[-1]
    record = run.read()
    assert record.state == "failed"
    assert record.launches[-1].exit_code == 1
    full = record.launches[-1].problem
    assert full and str(run.path) in full and full in recipe("--runs", disk, "results", "--json").stdout
    for room in (40_000, 0):
        fill(disk, room)
        again = recipe("resume", run.path)
        assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith(f"recipe: {run.path}: ")
        assert run.read() == record
    assert {path.name for path in run.path.iterdir()} == KEPT
    assert _mount(disk, "-o", "remount,size=4m").returncode == 0
    resumed = recipe.ok("resume", run.path)
    assert "checkpoint-" in resumed.stderr  # half of one is not what it goes on from
    adapters = [each.output / "adapter_model.safetensors" for each in (run, all_runs(tmp_path / "roomy")[0])]
    assert sha256(adapters[0]) == sha256(adapters[1])
    assert run.read().state == "finished"
