"""A third backend, tests/support/detached.py, which only its registration makes known to the commands."""

from collections.abc import Callable
from pathlib import Path

import detached
import orjson
import pytest
from conftest import Recipe, wait_until
from run_folders import a_run

from qlora_recipes.base.files import write_atomically
from qlora_recipes.run import backends, rundir
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import Job

NAME = "haider2024/code-llama-7b"


@pytest.fixture
def on(with_fake_axolotl: Recipe, fake_axolotl: Path, place: Path) -> tuple[str, str]:
    return "--on", f"{detached.NAME},python={fake_axolotl.with_name('python')}"


def states(place: Path) -> list[str]:
    return [backends.read(run).state for run in rundir.all_runs(place / "runs")]


def has_ended(run: RunDir, step: str) -> Callable[[], bool]:
    return lambda: backends.job_state(run, step) is None


def test_a_run_is_started_listed_cancelled_and_resumed(recipe, place, tiny_profile, on, monkeypatch):
    words = ("run", NAME, "--profile", "rehearsal", "--profile", tiny_profile, *on)
    preview = recipe.ok(*words, "--dry-run").stdout
    assert f"' resume runs/{NAME}/" in preview
    assert preview.endswith("/tiny-llama0 on 0 GPUs\n")
    assert not (place / "runs").exists()
    monkeypatch.setenv("FAKE_HOLD", "3")
    run = RunDir(place / recipe.ok(*words).stdout.strip())
    (job,) = run.jobs()
    wait_until(lambda: run.summary(run.read()).step == 3)
    (listed,) = recipe.json("results", "latest")
    assert listed["state"] == "running"
    assert "recipe cancel" in recipe.fails("resume", "latest").stderr
    where = run.path.relative_to(place)
    assert recipe.fails("resume", "latest", *on).stderr == f"recipe: {where}: the run is still running\n"
    assert recipe.ok("cancel", "latest").stdout == f"{where}: job {job.id} is asked to stop\n"
    wait_until(has_ended(run, "run"))
    assert states(place) == ["interrupted"]
    assert run.read().launches[0].error.endswith("--on detached` continues it")
    recipe.fails("cancel", "latest")
    monkeypatch.delenv("FAKE_HOLD")
    recipe.ok("resume", "latest", *on)
    wait_until(has_ended(run, "run"))
    assert states(place) == ["finished"]
    assert len(run.read().launches) == 2


@pytest.mark.long
def test_a_sweep_a_study_and_evaluations_are_jobs(recipe, place, tiny_profile, on):
    words = ("--profile", "rehearsal", "--profile", tiny_profile, "--metric", "bertscore:none", *on)
    sweep = ("sweep", NAME, "--set", "lora_r=4,8", "--limit", "2", *words)
    for step in recipe.json(*sweep)["steps"]:
        assert step["run"] == step["evaluate"]
        assert step["run"].startswith("queued (job ")
    again = recipe.json(*sweep)["steps"]
    assert {step["run"].partition(" ")[0] for step in again} <= {"running", "skipped"}  # skipped: is finished
    runs = rundir.all_runs(place / "runs")
    assert [len(run.jobs()) for run in runs] == [2, 2]
    for run in runs:
        wait_until(has_ended(run, "evaluate"))
    last = recipe.json(*sweep)
    assert [(step["run"], step["evaluate"]) for step in last["steps"]] == [("skipped", "skipped")] * 2
    assert all(row["bleu4"] is not None for row in last["results"])
    recipe.ok("evaluate", runs[0].path, "--adapter", "none", "--limit", "2", *on)
    wait_until(has_ended(runs[0], "evaluate"))
    assert [file.parent.parent.name for file in runs[0].path.rglob("scores.json")].count("evaluations") == 1
    study = ("reproduce", "haider2024", "--only", "code-llama-7b", *words)
    (step,) = recipe.json(*study)["steps"]
    assert step["run"].startswith("queued (job ")
    newest = rundir.all_runs(place / "runs")[-1]
    wait_until(has_ended(newest, "evaluate"))
    (step,) = recipe.json(*study)["steps"]
    assert (step["run"], step["evaluate"]) == ("skipped", "skipped")


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("slrum,time=1:00:00", "--on slrum: no backend is called slrum; did you mean slurm?"),
        ("local,time=1:00:00", "--on local,time=1:00:00: this machine has no options"),
        ("slurm,gpu", "--on slurm,gpu: expected key=value, as in --on slurm,partition=gpu"),
        ("detached", "--on detached: add ,python=FILE, the Python that has the package"),
    ],
)
def test_a_wrong_backend_or_option_is_refused(recipe, on, message):
    assert recipe.fails("run", NAME, "--rehearse", "--on", on).stderr == f"recipe: {message}\n"


@pytest.mark.parametrize("change", [{"hmac": None}, {"hmac": "0" * 64}, {"id": "13_0"}, {"backend": "hf"}, "copied"])
def test_of_a_job_that_this_user_did_not_submit_nothing_is_asked(recipe, place, monkeypatch, change):
    run = a_run(place / "runs", NAME, "theirs", 10.0)
    record = orjson.loads((run.path / "run.json").read_bytes())
    (run.path / "run.json").write_bytes(orjson.dumps(record | {"state": "running"}))
    for command in ("squeue", "scancel"):
        program = place / "bin" / command
        write_atomically(program, f"#!/bin/sh\necho {command} >> {place}/asked; echo '12_0|RUNNING|None|job.sh'")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/usr/bin:/bin")
    run.add_job(Job(backend="slurm", id="12_0", step="run", script="job.sh"))
    assert [row["jobs"] for row in recipe.json("results", run.path)] == ["run: running (job 12_0)"]
    assert recipe.ok("cancel", run.path).stdout.endswith("theirs: job 12_0 is cancelled\n")
    (place / "asked").unlink()
    if change == "copied":
        run.path.rename(run.path.with_name("copy"))
        run = RunDir(run.path.with_name("copy"))
    else:
        (job,) = orjson.loads(run.jobs_file.read_bytes())
        run.jobs_file.write_bytes(orjson.dumps([job | change]))
    (row,) = recipe.json("results", run.path)
    assert (row["state"], row["jobs"]) == ("running", "run: state not asked: the job is not yours")
    assert recipe.fails("cancel", run.path).stderr == f"recipe: {run.path}: nothing is running or queued\n"
    assert not (place / "asked").exists()


@pytest.mark.parametrize("file", ["slurm-run.log", "run.lock", "train.log"])
def test_no_job_is_submitted_that_would_write_through_a_link(place, file):
    run = a_run(place / "runs", NAME, "theirs", 10.0)
    (run.path / file).unlink(missing_ok=True)
    (run.path / file).symlink_to(place / "mine")
    result = backends.TaskResult(NAME)
    task = backends.Task(result, lambda: [backends.Command("run", run, ["resume"], result)], {}, 1)
    assert backends.claimed([task]) == []
    assert result.problem == f"{run.path / file}: leads out of the run's folder; replace it with a file or folder"
