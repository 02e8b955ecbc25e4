"""Removal of runs: what it asks, frees and refuses."""

import io
import os
import signal
from pathlib import Path

import pytest
from run_folders import a_checkpoint, a_run

from qlora_recipes.base.files import write_atomically
from qlora_recipes.base.processes import held
from qlora_recipes.results import export_records, score_records
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run.rundir import RunDir

NAME = "haider2024/llama-2-7b"


@pytest.fixture
def run(place: Path) -> RunDir:
    folder = a_run(Path("runs"), NAME, "20260101-000000-1a2b3c4", 5.0)
    a_checkpoint(folder.output, 3)
    (folder.output / "adapter").write_bytes(b"0" * 2**24)
    return folder


def test_checkpoints_go_and_the_adapter_stays(run, recipe):
    done = recipe.ok("remove", "latest", "--checkpoints", "--yes")
    assert done.stdout == f"{run.path}: 0.00 GiB\n"
    assert done.stderr == "freed: 0.00 GiB\n"
    assert [file.name for file in run.output.iterdir()] == ["adapter"]
    again = recipe.fails("remove", "latest", "--checkpoints", "--yes").stderr
    assert again == "recipe: latest: there is nothing to remove\n"


def test_a_run_goes_with_all_its_files_once_however_often_it_is_named(run, recipe, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # no terminal
    refused = recipe.fails("remove", run.path, "latest")
    assert refused.stdout == f"{run.path}: 0.02 GiB\n"
    assert refused.stderr == "recipe: Remove?: not asked without a terminal; add --yes\n"
    assert run.path.exists()
    assert recipe.ok("remove", run.path, "latest", "--yes").stderr == "freed: 0.02 GiB\n"
    assert not run.path.exists()


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_at_a_terminal_it_asks(run, recipe, monkeypatch, answer, code):
    terminal = io.StringIO(f"{answer}\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    recipe.ok("remove", run.path, code=code)
    assert run.path.exists() == bool(code)


def test_files_of_others_stay(run, recipe):
    for name in ("notes.txt", "data/rows.jsonl", "my.log"):
        write_atomically(run.path / name, "mine")
    said = recipe.ok("remove", "latest", "--yes").stderr
    assert said.splitlines()[0] == f"{run.path}: not of the run, so kept: data, my.log, notes.txt"
    assert {file.name for file in run.path.iterdir()} == {"data", "my.log", "notes.txt"}


def test_an_interrupted_removal_leaves_a_run_that_can_be_removed(run, recipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda _: os.kill(os.getpid(), signal.SIGINT))
        recipe.ok("remove", run.path, "--yes", code=130)
    assert run.output.exists()
    recipe.ok("remove", run.path, "--yes")
    assert not run.path.exists()


def test_a_link_or_a_name_of_several_runs_removes_none(run, recipe):
    link = Path("runs", "link")
    link.symlink_to(run.path.absolute())
    message = recipe.fails("remove", link, "--yes").stderr
    assert message == f"recipe: {link}: is a link; name the folder {run.path.absolute()}\n"
    link.unlink()
    a_run(Path("runs"), NAME, "20260102-000000-1a2b3c4", 5.0)
    names = "20260101-000000-1a2b3c4, 20260102-000000-1a2b3c4"
    for name in (NAME, f"runs/{NAME}", "llama-2"):
        message = recipe.fails("remove", name, "--yes").stderr.splitlines()[-1]
        assert message == f"recipe: {name}: there are 2 such runs: {names}; name the ones to remove"
    recipe.ok("remove", "20260101", "--yes")
    assert not run.path.exists()


def test_a_running_run_stays(run, recipe):
    record = run.read()
    record.state = "running"
    run.write(record)
    with held(run.path / ".lock", "busy"):
        message = recipe.fails("remove", "latest", "--yes").stderr
    remedy = f"stop it with `recipe cancel {run.path}` first"
    assert message == f"recipe: {run.path}: not removed: the run is running; {remedy}\n"


def test_a_run_with_a_record_stays(run, recipe):
    gpus = [{"name": "NVIDIA L4", "compute_capability": "8.9"}]
    record = run.read()
    record.digest, record.provenance = "d" * 64, {"gpus": gpus, "packages": {}}
    record.state = "failed"
    run.write(record)
    exported = export_records.record_of_run(RunResult(run, run.read()))
    file = Path("recipes", "haider2024", score_records.FOLDER, exported.file_name())
    file.parent.mkdir(parents=True)
    file.write_text(exported.text())
    message = recipe.fails("remove", "latest", "--yes").stderr
    assert message == (
        f"recipe: {run.path}: not removed: {file.name} is a record of this run; "
        "--checkpoints removes only its checkpoints\n"
    )
