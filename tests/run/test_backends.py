"""A third backend, tests/support/detached.py, which only its registration makes known to the commands."""

from collections.abc import Callable
from pathlib import Path

import detached
import pytest
from conftest import Recipe, wait_until

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


def test_a_run_whose_backend_is_unknown_is_refused(place):
    run = RunDir(place)
    run.add_job(Job(backend="elsewhere", id="1", step="run", user="me", script="job.sh"))
    with pytest.raises(backends.UserError) as refused:
        backends.job_state(run, "run")
    assert str(refused.value) == f"{place}/jobs.json: no backend is called elsewhere; move the file away"
