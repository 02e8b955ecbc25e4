"""Removal of runs: what it asks, frees and refuses."""

from pathlib import Path

import pytest
from run_folders import a_checkpoint, a_run

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
    assert done.stdout == f"{run.path}/output/checkpoint-3: 0.00 GiB\n"
    assert done.stderr == "freed: 0.00 GiB\n"
    assert [file.name for file in run.output.iterdir()] == ["adapter"]
    again = recipe.fails("remove", "latest", "--checkpoints", "--yes").stderr
    assert again == "recipe: latest: there is nothing to remove\n"


def test_a_run_goes_with_all_its_files_after_a_question(run, recipe):
    refused = recipe("remove", run.path)
    assert refused.returncode == 1 and run.path.exists()
    assert refused.stdout == f"{run.path}: 0.02 GiB\n"
    recipe.ok("remove", run.path, "--yes")
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
