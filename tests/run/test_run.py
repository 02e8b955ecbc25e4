"""Runs of a tiny Llama through the command, from launch to results; most of the stopped ones use a fake Axolotl."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from conftest import RECIPE, finish, start, typed, wait_until
from filelock import FileLock

from qlora_recipes.base import paths
from qlora_recipes.base.files import sha256
from qlora_recipes.base.processes import now
from qlora_recipes.config import compose
from qlora_recipes.config.compose import Request
from qlora_recipes.evaluate.scores_file import ADAPTER
from qlora_recipes.plan import plan, step_plan
from qlora_recipes.run import launch, run, rundir
from qlora_recipes.run.rundir import RunDir

PAGED = "haider2024/code-llama-7b"
REPEATABLE = ("--profile", "deterministic")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def undisturbed(place: Path, tiny_profile: Path) -> RunDir:
    return RunDir(place / finish(start(place, "run", PAGED, "--profile", tiny_profile, *REPEATABLE)))


@pytest.fixture(scope="module")
def fake_undisturbed(place: Path, tiny_profile: Path, fake_axolotl: Path) -> RunDir:
    """The same run with a fake Axolotl."""
    words = ("--runs", "fake", "run", PAGED, "--profile", tiny_profile)
    return RunDir(place / finish(start(place, *words, command=fake_axolotl)))


def trains(process: "subprocess.Popen[str]") -> bool:
    return len(psutil.Process(process.pid).children()) == 1


def end_of(process: "subprocess.Popen[str]", run: RunDir) -> None:
    """Wait for the end of a command that was stopped, and of what it left behind."""
    process.communicate(timeout=120)
    wait_until(lambda: run.read().state != "running")  # whoever still holds its lock


def stop(process: "subprocess.Popen[str]", how: str) -> None:
    (child,) = psutil.Process(process.pid).children()
    name, _, whom = how.partition(" to ")
    for one in {"training": [child], "command": [process], "both": [process, child]}[whom]:
        one.send_signal(signal.Signals[name])


ENDS = {"SIGKILL to both": -signal.SIGKILL, "SIGHUP to command": -signal.SIGHUP}


def has_done_five(runs: Path) -> bool:
    return any(record["step"] >= 5 for run in rundir.all_runs(runs) for record in run.read_metrics())


def interrupted_run(process: "subprocess.Popen[str]", runs: Path, how: str) -> RunDir:
    """A run that is stopped once it has done five of its sixteen steps."""
    try:
        wait_until(partial(has_done_five, runs), process)
        (run,) = rundir.all_runs(runs)
        assert run.read().state == "running"
        if how == "cancel":
            assert f"process {process.pid} " in finish(start(runs, "cancel", run.path))
        else:
            stop(process, how)
        end_of(process, run)
    finally:
        process.kill()
    assert process.returncode == ENDS.get(how, 1)
    return run


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in run.read_metrics() if "loss" in record]


def check_interrupted(run: RunDir, saved: bool) -> None:
    """A run that was stopped within a step records how far it got, and has a checkpoint, of that step if `saved`."""
    assert run.read().state == "interrupted"
    done = [step for step, _ in losses(run)]
    assert done == list(range(1, done[-1] + 1))
    assert 5 <= done[-1] < 16
    assert run.summary(run.read()).step == done[-1]
    assert run.last_checkpoint() == run.output / f"checkpoint-{done[-1] if saved else 4}"


def check_resumed(run: RunDir, undisturbed: RunDir) -> None:
    """A run that was interrupted and resumed is the same as one that was not."""
    record = run.read()
    assert record.state == "finished"
    assert record.launches[-1].exit_code == 0
    assert record.launches[1].resumed_from
    assert record.adapter
    assert record.adapter.sha256 == sha256(run.output / ADAPTER)
    assert record.adapter.sha256 == sha256(undisturbed.output / ADAPTER)
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize(
    ("how", "saved"),
    [
        ("SIGINT to training", False),
        ("SIGHUP to command", True),  # as when its terminal is closed: with its parent gone Linux sends SIGTERM
        ("cancel", True),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_adapter(
    tmp_path, tiny_profile, fake_axolotl, with_fake_axolotl, fake_undisturbed, how, saved
):
    words = ("run", PAGED, "--profile", tiny_profile)
    run = interrupted_run(start(tmp_path, *words, command=fake_axolotl, FAKE_HOLD="5"), tmp_path / "runs", how)
    check_interrupted(run, saved)
    resumed = with_fake_axolotl("resume", "latest")
    assert resumed.returncode == 0
    assert tmp_path / resumed.stdout.strip() == run.path
    check_resumed(run, fake_undisturbed)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    with_fake_axolotl.ok("resume", run.path)
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before


def test_a_recipe_that_changed_since_its_run_is_noted(tmp_path, with_fake_axolotl, tiny_profile):
    mine = tmp_path / "mine.yaml"
    mine.write_text(paths.recipe_file(PAGED).read_text())
    with_fake_axolotl.ok("run", "mine.yaml", "--profile", tiny_profile)
    (run,) = rundir.all_runs(tmp_path / "runs")
    record = run.read()
    record.state = "failed"
    run.write(record)
    assert with_fake_axolotl.json("results", run.path)[0]["recipe_note"] is None
    mine.write_text(mine.read_text().replace("\nlora_r: ", "\nlora_r: 1"))
    note = "mine.yaml is missing or has changed since the run began; the run keeps its own config"
    changed = f"{note}; lora_r: 32 -> 132"
    assert with_fake_axolotl.json("results", run.path)[0]["recipe_note"] == changed
    assert changed in with_fake_axolotl.ok("results").stdout.replace("\n", " ")
    assert with_fake_axolotl.ok("resume", run.path).stderr.splitlines()[0] == note


@pytest.mark.long
def test_a_killed_training_goes_on_to_the_same_adapter(place, tiny_profile, undisturbed):
    """The same with real Axolotl, whose trainings the profile makes equal to the last bit."""
    process = start(place, "--runs", "real", "run", PAGED, "--profile", tiny_profile, *REPEATABLE)
    run = interrupted_run(process, place / "real", "SIGKILL to both")
    check_interrupted(run, saved=False)
    finish(start(place, "--runs", "real", "resume", "latest"))
    check_resumed(run, undisturbed)


def test_without_its_folder_no_run_is_resumed(recipe, tmp_path, tiny_profile, monkeypatch):
    (tmp_path / "cwd").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "cwd")
        request = Request(PAGED, profiles=[str(tiny_profile)])
        patch.setenv(paths.RUNS, str(tmp_path / "runs"))
        folder = run.create(compose.compose(request), request)
    (tmp_path / "cwd").rename(tmp_path / "away")
    problem = "not found, but the run was started in this folder; restore it with its contents"
    assert recipe.fails("resume", folder.path).stderr == f"recipe: {tmp_path / 'cwd'}: {problem}\n"
    assert folder.read().launches == []


def test_a_temporary_folder_with_too_long_a_path_is_refused(recipe, tmp_path, tiny_profile, monkeypatch):
    monkeypatch.setenv(paths.RUNS, str(tmp_path / "runs"))
    request = Request(PAGED, profiles=[str(tiny_profile)])
    folder = run.create(compose.compose(request), request)
    place = f"/{'x' * 75}"
    monkeypatch.setattr("tempfile.tempdir", place)
    problem = "a path of 76 bytes, too long for the sockets of data loader workers"
    remedy = "set TMPDIR to a folder with at most 75 bytes"
    assert recipe.fails("resume", folder.path).stderr == f"recipe: {place}: {problem}; {remedy}\n"
    assert folder.read().launches == []


@pytest.mark.parametrize(("size", "message"), [(launch.TMPDIR_BYTES, ""), (launch.TMPDIR_BYTES + 1, "too long")])
def test_a_temporary_folder_of_that_size_has_sockets(size, message):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "x" * (size - len(short) - 1))
        folder.mkdir()
        code = "from multiprocessing.connection import Listener; Listener(family='AF_UNIX')"
        environment = os.environ | {"TMPDIR": str(folder)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (message in done.stderr) and bool(message) == bool(done.returncode), done.stderr


STEPS_OF_A_LAUNCH = 45
KILLS = ("SIGKILL to training", "SIGKILL to both", "SIGKILL to both", "SIGTERM to training", "SIGKILL to command")


def moment(chance: random.Random, run: RunDir, launches: int, written: int) -> Callable[[], bool]:
    """A moment of a launch: when it begins, or has got somewhere; of the third when it has a valid checkpoint, so that
    the later ones go on from one."""

    def launched() -> bool:
        return len(run.read().launches) > launches

    def got_somewhere() -> bool:
        return run.metrics.exists() and run.metrics.stat().st_size > written

    def has_saved() -> bool:
        return launched() and run.last_checkpoint() is not None  # a command has other children before its launch

    return has_saved if launches == 2 else chance.choice([launched, got_somewhere, got_somewhere])


@pytest.mark.long
def test_a_run_killed_at_random_moments_goes_on_to_the_same_adapter(tmp_path, tiny_profile, fake_axolotl):
    """Each kill meets a training: its process is there, and the run is interrupted afterwards, not at its end."""
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    kills = int(os.environ.get("KILLS", "30"))
    steps = kills * 50
    sets = (f"max_steps={steps}", "evals_per_epoch=null", "saves_per_epoch=null", "eval_steps=50", "save_steps=10")
    words = ["run", PAGED, "--profile", tiny_profile, *(word for one in sets for word in ("--set", one))]
    at_once = start(tmp_path, "--runs", "undisturbed", *words, command=fake_axolotl, FAKE_STEP="0")
    undisturbed = RunDir(tmp_path / finish(at_once))
    runs = tmp_path / "runs"
    slow = {"FAKE_STEP": "0.004", "FAKE_HOLD": str(STEPS_OF_A_LAUNCH)}  # so that no launch comes to the end
    process = start(tmp_path, *words, command=fake_axolotl, **slow)
    wait_until(lambda: bool(rundir.all_runs(runs)) and bool(rundir.all_runs(runs)[0].read().launches), process)
    (run,) = rundir.all_runs(runs)
    for kill in range(kills):
        written = 0
        if kill:
            written = run.metrics.stat().st_size if run.metrics.exists() else 0
            process = start(tmp_path, "resume", "latest", command=fake_axolotl, **slow)
        wait_until(moment(chance, run, kill, written), process)
        wait_until(partial(trains, process), process)
        time.sleep(chance.uniform(0, 0.1))  # in which it saves checkpoints, too
        assert process.poll() is None
        how = chance.choice(KILLS)
        stop(process, how)
        end_of(process, run)
        record = run.read()
        assert record.state == "interrupted", how
        assert len(record.launches) == kill + 1, how
        assert run.summary(record).step < steps
    finish(start(tmp_path, "resume", "latest", command=fake_axolotl, FAKE_STEP="0"))
    record = run.read()
    assert record.state == "finished"
    assert record.summary.step == steps
    assert len(record.launches) == kills + 1
    assert sha256(run.output / ADAPTER) == sha256(undisturbed.output / ADAPTER)
    assert losses(run) == losses(undisturbed)
    assert sum(launch.resumed_from is not None for launch in record.launches) > kills // 2


def test_a_real_run_records_all(undisturbed, tiny_profile):
    record = undisturbed.read()
    assert record.state == "finished"
    assert record.recipe == PAGED
    assert record.profiles == [str(tiny_profile), "deterministic"]
    assert not record.rehearsal
    assert record.summary.step == record.summary.max_steps == 16
    assert record.summary.eval_loss is not None
    assert record.summary.eval_loss_first is not None
    assert record.summary.tokens_per_second
    assert {"base_model", "fp16", "datasets.0.path"} <= {difference.key for difference in record.differences}
    for file in record.data:
        assert file.sha256 == sha256(Path(record.cwd, file.path))
        assert file.rows
    assert record.provenance["packages"]["axolotl"].startswith("0.21")
    assert record.provenance["cuda"] == torch.version.cuda
    assert record.provenance["git"] is None or len(record.provenance["git"]["revision"]) == 40
    assert undisturbed.config["optimizer"] == "paged_adamw_32bit"
    log = undisturbed.log.read_text()
    assert "Starting trainer" in log
    assert "Dropping attention" not in log


def test_checkpoints_are_as_large_as_planned(undisturbed):
    memory = step_plan.plan_step(undisturbed.config, None)[0].memory
    planned = plan.checkpoints(undisturbed.config, memory)
    folders = list(undisturbed.output.glob("checkpoint-*"))
    assert len(folders) in (planned.most, planned.most - 1)  # but while one is being saved
    for folder in folders:
        size = sum((folder / name).stat().st_size for name in (ADAPTER, "optimizer.pt"))
        assert size == pytest.approx(planned.size, rel=0.1)  # with names, and a few values for each tensor


@pytest.mark.long
def test_early_stopping_finishes_a_run_and_is_named(place, tiny_profile):
    settings = ("learning_rate=10", "early_stopping_patience=1", "evals_per_epoch=null", "saves_per_epoch=null")
    sets = [word for one in (*settings, "eval_steps=2", "save_steps=2") for word in ("--set", one)]
    words = ("--runs", "early", "run", PAGED, "--profile", tiny_profile, *sets, "--force", "value:learning_rate")
    run = RunDir(place / finish(start(place, *words)))
    record = run.read()
    assert record.state == "finished"
    assert record.summary.ended == "early stopping"
    assert record.summary.step == 4
    assert record.summary.kept_step == 2
    assert sha256(run.output / ADAPTER) == sha256(run.output / "checkpoint-2" / ADAPTER)
    losses = {metric["step"]: metric["eval_loss"] for metric in run.read_metrics() if "eval_loss" in metric}
    assert record.summary.eval_loss == losses[2] < losses[4]
    assert "4/16, early stopping" in finish(start(place, "--runs", "early", "results"))


@pytest.mark.parametrize(
    ("code", "stopped", "ended", "has_adapter", "state"),
    [
        (0, False, "complete", True, "finished"),
        (0, False, "complete", False, "failed"),
        (1, False, "complete", True, "failed"),
        (-signal.SIGKILL, False, "complete", True, "interrupted"),  # while it saved the adapter
        (0, False, "early stopping", True, "finished"),
        (0, False, "signal", True, "interrupted"),
        (1, False, "signal", True, "interrupted"),  # to torchrun, which then exits with 1
        (0, False, "callback", True, "failed"),
        (0, False, "no batch", True, "failed"),
        (0, False, None, True, "interrupted"),  # by SIGINT
        (1, True, None, False, "interrupted"),
        (1, False, None, False, "failed"),
    ],
)
def test_the_state_of_a_run_follows_from_the_end_of_its_process(code, stopped, ended, has_adapter, state):
    assert launch._state(code, stopped, ended, has_adapter) == state


def test_a_failing_axolotl_fails_the_run(with_fake_axolotl, tiny_profile, tmp_path):
    done = with_fake_axolotl("run", PAGED, "--profile", tiny_profile, "--set", "lr_scheduler_kwargs={nonsense: 1}")
    (run,) = rundir.all_runs(tmp_path / "runs")
    assert done.returncode == 1
    assert run.read().state == "failed"
    assert "TypeError: " in done.stderr
    *_, raised, error, end = done.stderr.splitlines()
    assert error.startswith("TypeError: ")
    assert end.endswith(f": Axolotl failed; the full log is {run.log.relative_to(tmp_path)}")
    shown = with_fake_axolotl("results", "latest")
    assert f"{raised} {error} {end}" in shown.stdout
    assert shown.stderr.endswith(f"next: recipe resume {run.path.name}\n")
    (row,) = with_fake_axolotl.json("results")
    assert row["trouble"] == "\n".join([raised, error, end])


def drop_half_prepared(run: Path, prepared: Path) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(f"dataset_prepared_path: {prepared}\n")
    launch._drop_half_prepared(RunDir(run), rundir.Run(recipe="r", recipe_file="f", recipe_sha256="s", cwd=str(run)))


def test_half_prepared_rows_are_removed_in_the_run_only_and_not_while_they_are_written(tmp_path):
    half, complete = (tmp_path / "prepared" / name for name in ("half", "complete"))
    half.mkdir(parents=True)  # by a process that was killed
    (half / "data-00000-of-00001.arrow").touch()
    complete.mkdir()
    (complete / "dataset_info.json").touch()
    linked = tmp_path / "run" / "prepared"
    linked.mkdir(parents=True)
    (linked / "half").symlink_to(half)
    for prepared in (half.parent, linked):
        drop_half_prepared(tmp_path / "run", prepared)
        assert half.is_dir()
    with FileLock(half.parent / "datasets_prep.lock"):  # of a process that is writing them
        drop_half_prepared(tmp_path, half.parent)
        assert half.is_dir()
    drop_half_prepared(tmp_path, half.parent)
    assert not half.is_dir()
    assert complete.is_dir()


def test_a_run_that_was_queued_is_checked_against_the_machine_that_trains_it(
    recipe, tmp_path, tiny_profile, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    forced = ["bad-row:datasets.0.path"]  # not found a second time, when rows are not read
    request = Request(PAGED, profiles=[str(tiny_profile)], overrides=typed("fp16=true", "bf16=false"), force=forced)
    folder = run.create(compose.compose(request), request)
    done = recipe("resume", folder.path, "--force", *forced)
    assert done.returncode == 2
    assert "[no-gpu" in done.stderr
    assert folder.read().state == "failed"
    assert folder.read().launches == []
    (row,) = recipe.json("results")
    assert f"recipe: {row['trouble']}" == done.stderr.splitlines()[-1]


def test_prepared_rows_of_a_template_with_a_date_are_those_of_the_day(tmp_path, tiny_profile, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dated = Request(PAGED, profiles=[str(tiny_profile)], force=["dated-template:chat_template"])
    folder = run.create(compose.compose(dated), dated)
    assert folder.prepared.endswith(f"-{now()[:10]}")


REACHED = """
import os, subprocess, sys, traceback
from qlora_recipes import cli

class Counted(subprocess.Popen):
    def __init__(self, command, *args, **options):
        if not str(command[0]).endswith("axolotl"):  # git, for the provenance
            return super().__init__(command, *args, **options)
        root = os.path.dirname(cli.__file__)
        frames = [frame.filename for frame in traceback.extract_stack() if frame.filename.startswith(root)]
        print(sum(name.startswith("qlora_recipes.") for name in sys.modules), len(frames), flush=True)
        os._exit(0)

subprocess.Popen = Counted
cli.main(sys.argv[1:])
"""


def test_a_training_is_started_through_few_modules_and_frames(tmp_path, tiny_profile):
    command = [RECIPE.with_name("python"), "-c", REACHED, "run", PAGED, "--profile", tiny_profile]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    modules, frames = map(int, done.stdout.split())
    assert modules <= 70
    assert frames <= 9
