"""A limit on the time of a command; Axolotl is a stand-in, which waits for a signal within a step."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Recipe

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.base.files import write_rows
from qlora_recipes.base.machine import now
from qlora_recipes.base.processes import stop_requests
from qlora_recipes.configs import compose
from qlora_recipes.configs.compose import Request
from qlora_recipes.places import time_limit
from qlora_recipes.places.local import Local
from qlora_recipes.running import run
from qlora_recipes.runs import launch
from qlora_recipes.runs.rundir import Launch, RunDir
from qlora_recipes.runs.tasks import Outcome, Work

RECIPE = "haider2024/code-llama-7b"
ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("11h", 39600),
        ("90m", 5400),
        ("45s", 45),
        ("1d", 86400),
        ("1d12h", 129600),
        ("11h30m", 41400),
        ("1.5H", 5400),
        ("2:30:00", 9000),
        ("1-00:00:30", 86430),
    ],
)
def test_a_time_is_written_as_for_timeout_or_slurm(text: str, seconds: float) -> None:
    assert time_limit.seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "2:30", "11 h", "0h", "-5m", "h", "30m11h", "1h1h", "2:60:00", "1e3h", "nanh"]
)
def test_what_is_no_time_or_could_be_two_is_refused_with_examples(recipe: Recipe, text: str) -> None:
    with pytest.raises(UserError, match="write it as 11h, 90m, 11h30m"):
        time_limit.seconds_of(text)
    done = recipe("run", RECIPE, f"--time-limit={text}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--time-limit {text}: not a time with its unit" in done.stderr


@pytest.mark.parametrize(
    "words", [("run", RECIPE), ("resume", "latest"), ("sweep", RECIPE, "targets"), ("reproduce", "haider2024")]
)
def test_a_queued_job_has_the_limit_of_its_queue(recipe: Recipe, words: tuple[str, ...]) -> None:
    done = recipe(*words, "--time-limit", "11h", "--on", "slurm")
    assert done.returncode == 2
    assert "--time-limit: works only with --on local; --slurm time=11:00:00 is that of a job" in done.stderr


def test_what_it_takes_to_come_to_a_checkpoint_is_what_was_longest_so_far(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert time_limit.seconds_to_checkpoint(metrics) == 0
    rows = [
        {"time": 100, "phase": "first evaluation"},
        {"time": 130, "phase": "training"},
        {"time": 150, "step": 10, "loss": 1.0, "step_seconds": 20},  # two a step
        {"time": 151, "phase": "evaluating"},
        {"time": 171, "phase": "training"},
        {"time": 171, "phase": "saving a checkpoint"},
        {"time": 176, "phase": "training"},
        {"time": 180, "phase": "evaluating"},  # killed there, and resumed a day later
        {"time": 86400, "phase": "reading and tokenizing rows"},
        {"time": 86500, "phase": "training"},
    ]
    write_rows(metrics, rows)
    assert time_limit.seconds_to_checkpoint(metrics) == 30 + 2 + 2 * 5
    with metrics.open("a") as stream:
        stream.write('null\n{"phase": "evaluating"}\n{"step_seconds": "x", "step": 11}\n{"time"')
    assert time_limit.seconds_to_checkpoint(metrics) == 30 + 2 + 2 * 5


@pytest.fixture
def with_stand_in(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process start the stand-in, which holds after three steps."""
    monkeypatch.setattr(launch, "AXOLOTL", stand_in.with_name("axolotl"))
    monkeypatch.setattr(sys, "executable", str(stand_in.with_name("python")))
    monkeypatch.setenv("STAND_IN_HOLD", "3")


def a_run(place: Path, profile: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 42) -> RunDir:
    """A run that was killed when it had hardly begun, so that it is resumed without being checked anew."""
    with monkeypatch.context() as patch:
        patch.chdir(place)
        request = Request(RECIPE, profiles=[str(profile)], overrides=[f"seed={seed}"])
        composed = compose.compose(request)
        folder = run.create(composed, request, Path("runs"))
        record = folder.read()
        record.launches.append(Launch(command=[], started=now()))
        record.state = "interrupted"
        folder.write(record)
    return RunDir(place / folder.path)


def stopped(recipe: Recipe, folder: RunDir) -> "subprocess.CompletedProcess[str]":
    """A training that its limit has ended: a longer one on a machine that is too busy to begin within it."""
    for seconds in (2, 10, 60):
        done = recipe("resume", folder.path, "--time-limit", f"{seconds}s")
        if "with a checkpoint" in done.stderr:
            break
    return done


@pytest.mark.usefixtures("with_stand_in")
def test_a_training_ends_at_a_checkpoint_before_the_limit_and_goes_on_to_the_same_adapter(
    recipe: Recipe, tmp_path: Path, tiny_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = a_run(tmp_path, tiny_profile, monkeypatch), a_run(tmp_path, tiny_profile, monkeypatch)
    done = stopped(recipe, folder)
    assert done.returncode == 1
    limit = done.args[-1]
    assert f"ended at step 4 of 16 with a checkpoint, before the limit of {limit}; " in done.stderr
    assert f"`recipe resume {folder.path} --time-limit {limit}` continues it" in done.stderr
    assert folder.read().state == "interrupted"
    assert [path.name for path in folder.output.glob("checkpoint-*")] == ["checkpoint-4"]
    monkeypatch.delenv("STAND_IN_HOLD")
    for run_ in (folder, whole):
        assert recipe("resume", run_.path, "--time-limit", "11h").returncode == 0
    assert folder.read().launches[-1].resumed_from == "checkpoint-4"
    assert (folder.output / ADAPTER).read_bytes() == (whole.output / ADAPTER).read_bytes()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.fixture
def limited() -> Iterator[None]:
    """A limit that is over in three seconds."""
    lift = time_limit.begin("3s")
    yield
    lift()


@pytest.mark.usefixtures("with_stand_in", "limited")
def test_of_several_runs_the_first_ends_at_a_checkpoint_and_the_next_is_not_begun(
    tmp_path: Path, tiny_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [a_run(tmp_path, tiny_profile, monkeypatch, seed) for seed in (1, 2)]
    commands = [[run.command(folder, tmp_path / "runs")] for folder in folders]
    works = [Work(Outcome(RECIPE), lambda words=words: words, gpus=0) for words in commands]
    Local(rehearsal=True, jobs=None, options=[]).submit(works, "two", tmp_path / "runs", [])
    first, second = (work.outcome.problem for work in works)
    assert first == "ended before the limit of 3s; run the same command again to continue"
    assert second == "ended before the limit of 3s, before it was begun; run the same command again to continue"
    assert [len(folder.read().launches) for folder in folders] in ([2, 1], [1, 1])  # too busy to start it in time


@pytest.mark.usefixtures("limited")
def test_a_training_that_got_nowhere_needs_a_longer_limit(
    tmp_path: Path, tiny_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(tmp_path, tiny_profile, monkeypatch)
    longer = rf"ended without a new checkpoint, before the limit of 3s; `recipe resume {folder.path}` with a longer"
    with pytest.raises(WorkFailed, match=longer), stop_requests() as stops, time_limit.training(folder):
        while not stops:
            time.sleep(0.1)
        raise WorkFailed("interrupted")


@pytest.mark.usefixtures("limited")
def test_what_went_wrong_at_the_limit_is_told(
    tmp_path: Path, tiny_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(tmp_path, tiny_profile, monkeypatch)
    record = folder.read()
    record.launches[-1].problem = "no space left in /scratch"
    folder.write(record)
    with pytest.raises(WorkFailed, match="no space left"), stop_requests() as stops, time_limit.training(folder):
        while not stops:
            time.sleep(0.1)
        raise WorkFailed("no space left in /scratch")


@pytest.mark.usefixtures("limited")
def test_a_command_that_trains_nothing_ends_too(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended before the limit of 3s; run the same command again"):
        signal.sigtimedwait([signal.SIGTERM], 30)
