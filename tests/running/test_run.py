"""Runs of a tiny Llama through the command, from launch to results; where they are stopped, mostly of a stand-in."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import orjson
import psutil
import pytest
import torch
from conftest import finish, start
from filelock import FileLock

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import sha256
from qlora_recipes.configs import compose
from qlora_recipes.configs.compose import Request
from qlora_recipes.running import create
from qlora_recipes.runs import checkpoints, launch, records, rundir
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores.evaluations import ADAPTER

PAGED = "haider2024/code-llama-7b"
Stop = Callable[["subprocess.Popen[str]"], None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all runs of this module are started in."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def undisturbed(place: Path, tiny_profile: Path) -> RunDir:
    """A run of a recipe with the paged optimizer that nothing interrupts."""
    return RunDir(place / finish(start(place, "run", PAGED, "--profile", tiny_profile)))


def adapter_hash(run: RunDir) -> str:
    return hashlib.sha256((run.output / "adapter_model.safetensors").read_bytes()).hexdigest()


def wait_until(holds: Callable[[], bool], process: "subprocess.Popen[str]", patience: float = 300) -> None:
    """Wait until something holds, while the command goes on."""
    deadline = time.monotonic() + patience
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.003)


def training(process: "subprocess.Popen[str]") -> psutil.Process:
    """The process that trains; there is just one."""
    (child,) = psutil.Process(process.pid).children()
    return child


def trains(process: "subprocess.Popen[str]") -> bool:
    return len(psutil.Process(process.pid).children()) == 1


def end_of(process: "subprocess.Popen[str]", run: RunDir) -> None:
    """Wait for the end of a command that was stopped, and of what it left behind."""
    process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while run.read().state == "running":  # whoever still holds its lock
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted_run(process: "subprocess.Popen[str]", runs: Path, stop: Stop) -> RunDir:
    """A run that `stop` is called on once it has done five of its sixteen steps."""
    try:
        wait_until(partial(_has_done_five, runs), process)
        (run,) = rundir.all_runs(runs)
        assert run.read().state == "running"
        stop(process)
        end_of(process, run)
    finally:
        process.kill()
    ends = {kill_both: -signal.SIGKILL, kill_command: -signal.SIGKILL, hang_up_command: -signal.SIGHUP}
    assert process.returncode == ends.get(stop, 1)
    return run


def kill_child(process: "subprocess.Popen[str]") -> None:
    training(process).kill()


def terminate_child(process: "subprocess.Popen[str]") -> None:
    training(process).terminate()


def interrupt_child(process: "subprocess.Popen[str]") -> None:
    training(process).send_signal(signal.SIGINT)


def kill_both(process: "subprocess.Popen[str]") -> None:
    child = training(process)
    process.kill()
    child.kill()
    child.wait(30)


def kill_command(process: "subprocess.Popen[str]") -> None:
    process.kill()


def hang_up_command(process: "subprocess.Popen[str]") -> None:
    """As when its terminal is closed."""
    process.send_signal(signal.SIGHUP)


def terminate_command(process: "subprocess.Popen[str]") -> None:
    process.terminate()


def cancel(process: "subprocess.Popen[str]") -> None:
    (folder,) = (
        Path(file.path).parent for file in psutil.Process(process.pid).open_files() if file.path.endswith("lock")
    )
    assert f"process {process.pid} " in finish(start(folder, "cancel", folder))


STOPS: list[Stop] = [interrupt_child, kill_both, kill_command, hang_up_command, terminate_command, cancel]
IN_ORDER = (kill_command, hang_up_command, terminate_command, cancel)
"""After these the training ends by itself, with a checkpoint; with its parent gone Linux sends it SIGTERM."""


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in run.read_metrics() if "loss" in record]


def check_interrupted(run: RunDir, stop: Stop) -> None:
    """A run that was stopped within a step tells how far it got, and has a checkpoint."""
    assert run.read().state == "interrupted"
    done = [step for step, _ in losses(run)]
    assert done == list(range(1, done[-1] + 1))
    assert 5 <= done[-1] < 16
    assert run.summary(run.read()).step == done[-1]
    assert "Starting trainer" in run.log.read_text()
    checkpoint = run.last_checkpoint()
    assert checkpoint == run.output / f"checkpoint-{done[-1] if stop in IN_ORDER else 4}"


def check_resumed(run: RunDir, undisturbed: RunDir) -> None:
    """A run that was interrupted and resumed is the same as one that was not."""
    record = run.read()
    assert record.state == "finished"
    assert [launch.exit_code for launch in record.launches][-1] == 0
    assert record.launches[1].resumed_from
    assert record.adapter and record.adapter.sha256 == adapter_hash(run) == adapter_hash(undisturbed)
    assert record.test_rows and Path(record.test_rows.path).name == "test.jsonl"
    assert losses(run) == losses(undisturbed)


@pytest.fixture(scope="module")
def stand_in_undisturbed(place: Path, tiny_profile: Path, stand_in: Path) -> RunDir:
    """The same run with a stand-in for Axolotl."""
    words = ("run", PAGED, "--profile", tiny_profile, "--runs", "stand-in")
    return RunDir(place / finish(start(place, *words, command=stand_in)))


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_goes_on_to_the_same_adapter(
    place: Path, tiny_profile: Path, stand_in: Path, stand_in_undisturbed: RunDir, stop: Stop
) -> None:
    runs = stop.__name__
    words = ("run", PAGED, "--profile", tiny_profile, "--runs", runs)
    run = interrupted_run(start(place, *words, command=stand_in, STAND_IN_HOLD="5"), place / runs, stop)
    check_interrupted(run, stop)
    resumed = finish(start(place, "resume", "latest", "--runs", runs, command=stand_in))
    assert place / resumed == run.path
    check_resumed(run, stand_in_undisturbed)


@pytest.mark.long
def test_a_killed_training_goes_on_to_the_same_adapter(place: Path, tiny_profile: Path, undisturbed: RunDir) -> None:
    """The same with real Axolotl."""
    process = start(place, "run", PAGED, "--profile", tiny_profile, "--runs", "real")
    run = interrupted_run(process, place / "real", kill_both)
    assert run.read().state == "interrupted"
    assert 5 <= run.summary(run.read()).step < 16
    finish(start(place, "resume", "latest", "--runs", "real"))
    check_resumed(run, undisturbed)


def _has_done_five(runs: Path) -> bool:
    return any(record["step"] >= 5 for run in rundir.all_runs(runs) for record in run.read_metrics())


def test_a_loss_that_is_no_number_is_said_while_it_trains(place: Path, tiny_profile: Path, stand_in: Path) -> None:
    words = ("run", PAGED, "--profile", tiny_profile, "--runs", "nan")
    process = start(place, *words, command=stand_in, STAND_IN_NAN="6", STAND_IN_STEP="0.2")
    _, said = process.communicate(timeout=600)
    assert len(re.findall(r"NaN.* 6; `recipe cancel nan/", said)) == 1


def test_without_axolotl_or_its_folder_nothing_is_begun(
    place: Path, tmp_path: Path, tiny_profile: Path, stand_in: Path
) -> None:
    axolotl = stand_in.with_name("axolotl")
    away = axolotl.rename(axolotl.with_name("away"))
    try:
        said = finish(start(tmp_path, "run", PAGED, "--profile", tiny_profile, command=stand_in), code=2)
    finally:
        away.rename(axolotl)
    assert f"{axolotl}: " in said
    assert not (tmp_path / "runs").exists()
    there = tmp_path / "there"
    there.mkdir()
    words = ("run", PAGED, "--profile", tiny_profile, "--runs", tmp_path / "runs")
    run = interrupted_run(
        start(there, *words, command=stand_in, STAND_IN_HOLD="5"), tmp_path / "runs", terminate_command
    )
    there.rename(tmp_path / "elsewhere")
    assert f"{there}: " in finish(start(tmp_path, "resume", run.path, command=stand_in), code=2)
    assert (run.read().state, len(run.read().launches)) == ("interrupted", 1)


@pytest.mark.long
def test_where_a_gpus_memory_does_not_suffice_plan_and_measure_are_compared(
    place: Path, tiny_profile: Path, stand_in: Path
) -> None:
    words = ("run", PAGED, "--profile", tiny_profile, "--runs", "too-big", "--set", "micro_batch_size=4")
    words += ("--set", "gradient_checkpointing=null")
    said = finish(start(place, *words, command=stand_in, STAND_IN_NO_MEMORY="5"), code=1)
    (run,) = rundir.all_runs(place / "too-big")
    assert run.read().state == "failed"
    planned = re.search(r"planned: ([\d.]+) GiB; .* [\d.]+ GiB", said)
    changes = re.findall(r"^    --set (\S+)=.*: ([\d.]+) GiB; ", said, re.MULTILINE)
    assert planned and "gradient_checkpointing" in dict(changes)
    assert all(float(needed) <= float(planned[1]) for _, needed in changes)


def test_a_damaged_checkpoint_is_skipped(
    place: Path, tiny_profile: Path, stand_in: Path, stand_in_undisturbed: RunDir
) -> None:
    words = ("run", PAGED, "--profile", tiny_profile, "--runs", "damaged")
    run = interrupted_run(start(place, *words, command=stand_in, STAND_IN_HOLD="5"), place / "damaged", cancel)
    before, last = sorted(run.output.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    (last / "optimizer.pt").unlink()  # without it, the trainer would go on with a new one
    resuming = start(place, "resume", run.path, command=stand_in)
    _, said = resuming.communicate(timeout=600)
    assert re.search(f"{last.name} .*optimizer.pt", said)
    step = before.name.partition("-")[2]
    expected = ("Axolotl\n", "tokenizing", f"training  {step}/16", "16/16  loss ")
    assert re.search(".*".join(map(re.escape, expected)), said, re.DOTALL), said
    record = run.read()
    assert (record.state, record.launches[-1].resumed_from) == ("finished", before.name)
    assert adapter_hash(run) == adapter_hash(stand_in_undisturbed)


STEPS_OF_A_LAUNCH = 45


def moment(chance: random.Random, run: RunDir, launches: int, written: int) -> Callable[[], bool]:
    """A moment of a launch: when it begins, when it has got somewhere, while it saves; of the third when it has a whole
    checkpoint, so that the later ones go on from one."""

    def launched() -> bool:
        return len(run.read().launches) > launches

    def got_somewhere() -> bool:
        return run.metrics.exists() and run.metrics.stat().st_size > written

    def is_saving() -> bool:
        """On a machine too busy to see that, when it has got as far as it gets."""
        folders = run.output.glob("checkpoint-*")
        saving = any(not (folder / checkpoints.MANIFEST).exists() for folder in folders)
        return got_somewhere() and (saving or run.metrics.read_bytes()[written:].count(b"\n") >= STEPS_OF_A_LAUNCH)

    def has_saved() -> bool:
        return run.last_checkpoint() is not None

    return has_saved if launches == 2 else chance.choice([launched, got_somewhere, got_somewhere, is_saving])


def tear(run: RunDir, chance: random.Random) -> None:
    """Cut the last line of the metrics, as a crash of the machine does; not that of a step that is in a checkpoint."""
    content, checkpoint = run.metrics.read_bytes() if run.metrics.exists() else b"", run.last_checkpoint()
    if not content.endswith(b"\n"):  # cut before, and nothing was added
        return
    last = content.splitlines()[-1]
    if not checkpoint or orjson.loads(last).get("step", 0) > int(checkpoint.name.partition("-")[2]):
        run.metrics.write_bytes(content[: -chance.randrange(2, len(last))])


@pytest.mark.parametrize("kills", [6, pytest.param(int(os.environ.get("KILLS", "30")), marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_goes_on_to_the_same_adapter(
    tmp_path: Path, tiny_profile: Path, stand_in: Path, kills: int
) -> None:
    """Each kill meets a training: its process is there, and the run is interrupted afterwards, not at its end."""
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    steps = kills * 50
    sets = (f"max_steps={steps}", "evals_per_epoch=null", "saves_per_epoch=null", "eval_steps=50", "save_steps=10")
    words = ["run", PAGED, "--profile", tiny_profile, *(word for one in sets for word in ("--set", one))]
    whole = RunDir(tmp_path / finish(start(tmp_path, *words, "--runs", "whole", command=stand_in, STAND_IN_STEP="0")))
    runs = tmp_path / "runs"
    slow = {"STAND_IN_STEP": "0.004", "STAND_IN_HOLD": str(STEPS_OF_A_LAUNCH)}  # so that no launch comes to the end
    process = start(tmp_path, *words, command=stand_in, **slow)
    wait_until(lambda: bool(rundir.all_runs(runs)) and bool(rundir.all_runs(runs)[0].read().launches), process)
    (run,) = rundir.all_runs(runs)
    for kill in range(kills):
        written = 0
        if kill:
            written = run.metrics.stat().st_size if run.metrics.exists() else 0
            process = start(tmp_path, "resume", "latest", command=stand_in, **slow)
        wait_until(moment(chance, run, kill, written), process)
        wait_until(partial(trains, process), process)
        time.sleep(chance.uniform(0, 0.05))
        child, stop = (
            training(process),
            chance.choice([kill_child, kill_both, kill_both, terminate_child, kill_command]),
        )
        assert child.is_running() and process.poll() is None
        stop(process)
        end_of(process, run)
        record = run.read()
        assert (record.state, len(record.launches)) == ("interrupted", kill + 1), stop
        assert run.summary(record).step < steps
        if stop is kill_both:
            tear(run, chance)
    finish(start(tmp_path, "resume", "latest", command=stand_in, STAND_IN_STEP="0"))
    record = run.read()
    assert (record.state, record.summary.step, len(record.launches)) == ("finished", steps, kills + 1)
    assert adapter_hash(run) == adapter_hash(whole)
    assert losses(run) == losses(whole)
    assert sum(launch.resumed_from is not None for launch in record.launches) > kills // 2


def test_a_run_tells_all(undisturbed: RunDir, tiny_profile: Path) -> None:
    record = undisturbed.read()
    assert record.state == "finished"
    assert record.recipe == PAGED
    assert record.profiles == [str(tiny_profile)]
    assert not record.rehearsal
    assert record.summary.step == record.summary.max_steps == 16
    assert record.summary.eval_loss is not None
    assert record.summary.eval_loss_first is not None
    assert record.summary.tokens_per_second
    assert {"base_model", "fp16", "datasets.0.path"} <= {difference.key for difference in record.differences}
    assert all(len(file.sha256) == 64 and file.rows for file in record.data)
    assert record.provenance["packages"]["axolotl"].startswith("0.21")
    assert record.provenance["cuda"] == torch.version.cuda
    assert record.provenance["git"] is None or len(record.provenance["git"]["revision"]) == 40
    cfg = yamlfiles.read_yaml(undisturbed.config)
    assert cfg["optimizer"] == "paged_adamw_32bit"
    assert "Dropping attention" not in undisturbed.log.read_text()


def test_a_finished_run_is_not_resumed(place: Path, undisturbed: RunDir) -> None:
    before = {file: file.stat().st_mtime_ns for file in undisturbed.path.rglob("*")}
    assert finish(start(place, "resume", undisturbed.path)) == str(undisturbed.path)
    assert {file: file.stat().st_mtime_ns for file in undisturbed.path.rglob("*")} == before


@pytest.mark.long
def test_early_stopping_finishes_a_run_and_is_named(place: Path, tiny_profile: Path) -> None:
    settings = ("learning_rate=10", "early_stopping_patience=1", "evals_per_epoch=null", "saves_per_epoch=null")
    sets = [word for one in (*settings, "eval_steps=2", "save_steps=2") for word in ("--set", one)]
    name = finish(
        start(
            place, "run", PAGED, "--profile", tiny_profile, *sets, "--force", "value:learning_rate", "--runs", "early"
        )
    )
    record = RunDir(place / name).read()
    assert (record.state, record.summary.ended) == ("finished", "early stopping")
    assert (record.summary.step, record.summary.kept_step) == (4, 2)
    output = RunDir(place / name).output
    assert sha256(output / ADAPTER) == sha256(output / "checkpoint-2" / ADAPTER)
    of_step = {each["step"]: each["eval_loss"] for each in RunDir(place / name).read_metrics() if "eval_loss" in each}
    assert record.summary.eval_loss == of_step[2] < of_step[4]
    assert "4/16, early stopping" in finish(start(place, "results", "--md", "--runs", "early"))


@pytest.mark.parametrize(
    ("code", "stopped", "ended", "has_adapter", "state"),
    [
        (0, False, "complete", True, "finished"),
        (0, True, "complete", True, "finished"),  # asked to stop at its last step
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
def test_a_run_is_finished_only_when_its_training_says_so(
    code: int, stopped: bool, ended: records.Ended | None, has_adapter: bool, state: str
) -> None:
    assert launch._state(code, stopped, ended, has_adapter) == state


def test_a_failing_axolotl_fails_the_run(place: Path, tiny_profile: Path, stand_in: Path) -> None:
    no_such_option = "lr_scheduler_kwargs={nonsense: 1}"
    arguments = ("--profile", tiny_profile, "--set", no_such_option, "--runs", "failing")
    message = finish(start(place, "run", PAGED, *arguments, command=stand_in), code=1)
    (run,) = rundir.all_runs(place / "failing")
    assert "TypeError: " in message and str(run.log.relative_to(place)) in message
    assert run.read().state == "failed"


def test_a_run_whose_folder_is_deleted_while_it_trains_fails(
    place: Path, tmp_path: Path, tiny_profile: Path, stand_in: Path
) -> None:
    runs, go = tmp_path / "runs", tmp_path / "go"
    words = ("run", PAGED, "--profile", tiny_profile, "--runs", runs)
    process = start(place, *words, command=stand_in, STAND_IN_HOLD="5", STAND_IN_GO=str(go))
    wait_until(partial(_has_done_five, runs), process)
    shutil.rmtree(runs)
    go.touch()
    assert "Traceback" not in finish(process, code=1)
    assert not rundir.all_runs(runs)


def test_rows_that_a_killed_process_half_prepared_are_prepared_anew(tmp_path: Path) -> None:
    half, whole = tmp_path / "prepared" / "half", tmp_path / "prepared" / "whole"
    for part in (half, whole):
        part.mkdir(parents=True)
        (part / "data-00000-of-00001.arrow").touch()
    (whole / "dataset_info.json").touch()
    folder = RunDir(tmp_path)
    folder.config.write_text("dataset_prepared_path: prepared\n")
    record = rundir.Run(recipe="r", recipe_file="f", recipe_sha256="s", cwd=str(tmp_path))
    with FileLock(tmp_path / "prepared" / "datasets_prep.lock"):  # of a process that is writing them
        launch._drop_half_prepared(folder, record)
        assert half.is_dir()
    launch._drop_half_prepared(folder, record)
    assert (half.is_dir(), whole.is_dir()) == (False, True)


@pytest.mark.parametrize("linked", [False, True])
def test_only_rows_in_the_cache_or_in_the_run_are_ever_removed(tmp_path: Path, linked: bool) -> None:
    precious = tmp_path / "mine" / "data" / "data-00000-of-00001.arrow"
    precious.parent.mkdir(parents=True)
    precious.touch()
    folder = RunDir(tmp_path / "run")
    (folder.path / "prepared").mkdir(parents=True)
    (folder.path / "prepared" / "data").symlink_to(precious.parent)
    folder.config.write_text(f"dataset_prepared_path: {'prepared' if linked else precious.parents[1]}\n")
    launch._drop_half_prepared(folder, rundir.Run(recipe="r", recipe_file="f", recipe_sha256="s", cwd=str(folder.path)))
    assert precious.is_file()


def test_a_run_that_was_queued_is_checked_against_the_machine_that_trains_it(
    tmp_path: Path, tiny_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forced = ["bad-row:datasets.0.path"]  # not found a second time, when rows are not read
    request = Request(PAGED, profiles=[str(tiny_profile)], overrides=["fp16=true", "bf16=false"], force=forced)
    folder = create.create(compose.compose(request), request, Path("runs"))
    assert "[no-gpu" in finish(start(tmp_path, "resume", folder.path), code=2)
    assert (folder.read().state, folder.read().launches) == ("failed", [])
