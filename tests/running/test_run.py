"""Real runs of real Axolotl with a tiny Llama, through the command, from launch to results."""

import hashlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import psutil
import pytest
from conftest import finish, start
from filelock import FileLock

from qlora_recipes.base import yamlfiles
from qlora_recipes.configs import compose
from qlora_recipes.configs.compose import Request
from qlora_recipes.running import run
from qlora_recipes.runs import launch, lookup, rundir
from qlora_recipes.runs.rundir import RunDir

PAGED = "haider2024/code-llama-7b"
EIGHT_BIT = "haider2024/llama-3.2-3b"


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


def interrupted_run(place: Path, profile: Path, runs: str, stop: Callable[["subprocess.Popen[str]"], None]) -> RunDir:
    """A run that `stop` is called on once it has done five of its sixteen steps; it ends with code 1."""
    process = start(place, "run", PAGED, "--profile", profile, "--runs", runs)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            found = lookup.all_runs(place / runs)
            if found and any(record["step"] >= 5 for record in found[0].read_metrics()):
                assert found[0].read().state == "running"
                stop(process)
                break
            time.sleep(0.01)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (1, -signal.SIGKILL), err
    finally:
        process.kill()
    (run,) = lookup.all_runs(place / runs)
    for _ in range(100):  # a data loader worker sees within 5 s that its parent was killed
        if run.read().state != "running":
            break
        time.sleep(0.1)
    return run


def kill_child(process: "subprocess.Popen[str]") -> None:
    (child,) = psutil.Process(process.pid).children()
    child.kill()


def terminate_child(process: "subprocess.Popen[str]") -> None:
    (child,) = psutil.Process(process.pid).children()
    child.terminate()


def interrupt_child(process: "subprocess.Popen[str]") -> None:
    (child,) = psutil.Process(process.pid).children()
    child.send_signal(signal.SIGINT)


def kill_both(process: "subprocess.Popen[str]") -> None:
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    child.kill()
    child.wait(30)


def cancel(process: "subprocess.Popen[str]") -> None:
    (folder,) = (
        Path(file.path).parent for file in psutil.Process(process.pid).open_files() if file.path.endswith("lock")
    )
    assert f"process {process.pid} is asked to stop" in finish(start(folder, "cancel", folder))


@pytest.mark.parametrize("stop", [kill_child, terminate_child, interrupt_child, kill_both, cancel])
def test_a_stopped_run_goes_on_to_the_same_adapter(
    place: Path, tiny_profile: Path, undisturbed: RunDir, stop: Callable[["subprocess.Popen[str]"], None]
) -> None:
    run = interrupted_run(place, tiny_profile, stop.__name__, stop)
    assert run.read().state == "interrupted"
    done = [record["step"] for record in run.read_metrics() if "loss" in record]
    assert done == list(range(1, done[-1] + 1))
    assert 5 <= done[-1] < 16
    assert run.read().summary.step == done[-1]
    assert "Starting trainer" in run.log.read_text()
    if stop in (terminate_child, cancel):
        assert run.last_checkpoint() == run.output / f"checkpoint-{done[-1]}"

    resumed = finish(start(place, "resume", "latest", "--runs", stop.__name__))
    assert place / resumed == run.path
    record = run.read()
    assert record.state == "finished"
    assert [launch.exit_code for launch in record.launches][-1] == 0
    assert record.launches[1].resumed_from
    assert adapter_hash(run) == adapter_hash(undisturbed)
    losses = [[(r["step"], r["loss"]) for r in x.read_metrics() if "loss" in r] for x in (run, undisturbed)]
    assert losses[0] == losses[1]


def test_a_damaged_checkpoint_is_skipped(place: Path, tiny_profile: Path, undisturbed: RunDir) -> None:
    run = interrupted_run(place, tiny_profile, "damaged", cancel)
    before, last = sorted(run.output.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    (last / "optimizer.pt").unlink()  # without it, the trainer would go on with a new one
    resuming = start(place, "resume", run.path)
    _, said = resuming.communicate(timeout=600)
    assert f"{last.name} is damaged: optimizer.pt is missing; it is skipped" in said
    record = run.read()
    assert (record.state, record.launches[-1].resumed_from) == ("finished", before.name)
    assert adapter_hash(run) == adapter_hash(undisturbed)


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
    assert record.provenance["git"] is None or len(record.provenance["git"]["revision"]) == 40
    cfg = yamlfiles.read_yaml(undisturbed.config)
    assert cfg["optimizer"] == "paged_adamw_32bit"
    assert "Dropping attention" not in undisturbed.log.read_text()


def test_a_finished_run_is_not_resumed(place: Path, undisturbed: RunDir) -> None:
    assert "is finished" in finish(start(place, "resume", undisturbed.path), code=2)


def test_a_missing_adapter_is_told(place: Path, undisturbed: RunDir) -> None:
    message = finish(start(place, "evaluate", undisturbed.path, "--adapter", "no/such/adapter"), code=2)
    assert "no/such/adapter: no adapter" in message
    assert not (undisturbed.path / "evaluations").exists()


def test_the_eight_bit_recipe_from_run_to_results(place: Path, tiny_profile: Path) -> None:
    name = finish(
        start(
            place,
            "run",
            EIGHT_BIT,
            "--profile",
            tiny_profile,
            "--set",
            "num_epochs=1",
            "--runs",
            "r",
            "--set",
            "weight_decay=0.02",
        )
    )
    for more in ((), ("--adapter", "none")):
        finish(start(place, "evaluate", name, "--limit", "5", "--max-new-tokens", "12", *more))
    run = RunDir(place / name)
    predictions = [orjson.loads(line) for line in (run.path / "predictions.jsonl").read_bytes().splitlines()]
    assert [row["row"] for row in predictions] == list(range(5))
    assert all(row["reference"] for row in predictions)
    assert '"weight_decay": 0.02' in run.log.read_text()
    (row,) = orjson.loads(finish(start(place, "results", "--json", "--runs", "r")))
    assert row["state"] == "finished"
    assert row["bleu4_published"] == 4.54
    assert row["rows_evaluated"] == 5
    assert row["bleu4_base_model"] is not None
    assert row["bleu4_difference"] is None  # the first five rows compare with nothing
    for form in ("--csv", "--md"):
        assert EIGHT_BIT in finish(start(place, "results", form, "--runs", "r"))


def test_early_stopping_finishes_a_run_and_is_named(place: Path, tiny_profile: Path) -> None:
    settings = ("learning_rate=1e-30", "early_stopping_patience=1", "evals_per_epoch=null", "saves_per_epoch=null")
    sets = [word for one in (*settings, "eval_steps=2", "save_steps=2") for word in ("--set", one)]
    name = finish(start(place, "run", PAGED, "--profile", tiny_profile, *sets, "--runs", "early"))
    record = RunDir(place / name).read()
    assert (record.state, record.summary.ended) == ("finished", "early stopping")
    assert record.summary.step == 4
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
        (0, False, None, True, "interrupted"),  # by SIGINT
        (1, True, None, False, "interrupted"),
        (1, False, None, False, "failed"),
    ],
)
def test_a_run_is_finished_only_when_its_training_says_so(
    code: int, stopped: bool, ended: rundir.Ended | None, has_adapter: bool, state: str
) -> None:
    assert launch._state(code, stopped, ended, has_adapter) == state


def test_a_failing_axolotl_fails_the_run(place: Path, tiny_profile: Path) -> None:
    no_such_option = "lr_scheduler_kwargs={nonsense: 1}"
    arguments = ("--profile", tiny_profile, "--set", no_such_option, "--runs", "failing")
    message = finish(start(place, "run", PAGED, *arguments), code=1)
    assert "Axolotl failed" in message
    (run,) = lookup.all_runs(place / "failing")
    assert run.read().state == "failed"


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


def test_a_run_that_was_queued_is_checked_against_the_machine_that_trains_it(
    tmp_path: Path, tiny_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forced = ["bad-row:datasets.0.path"]  # not found a second time, when rows are not read
    request = Request(PAGED, profiles=[str(tiny_profile)], overrides=["fp16=true", "bf16=false"], force=forced)
    folder = run.create(compose.compose(request), request, Path("runs"))
    said = finish(start(tmp_path, "resume", folder.path), code=2)
    assert "no NVIDIA GPU was found" in said
    assert (folder.read().state, folder.read().launches) == ("failed", [])
