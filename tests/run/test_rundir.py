import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from run_folders import a_checkpoint

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.terminal import TrainingProgress
from qlora_recipes.run import rundir
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import Run
from qlora_recipes.training.summary import summarise


def a_run(path: Path, **fields: Any) -> RunDir:
    path.mkdir(parents=True)
    run = RunDir(path)
    run.write(Run(recipe="x", recipe_file="x", recipe_sha256="x", cwd="/", **fields))
    return run


def write_metrics(run: RunDir, *lines: bytes) -> None:
    run.metrics.write_bytes(b"\n".join(lines) + b"\n")


def test_a_run_is_running_only_while_a_process_holds_it(tmp_path):
    run = a_run(tmp_path / "r", state="running")
    assert run.read().state == "interrupted"
    code = "import sys; from qlora_recipes.run.rundir import RunDir; from pathlib import Path\n"
    code += "with RunDir(Path(sys.argv[1])).held(): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(run.path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    assert run.read().state == "running"
    with pytest.raises(UserError) as refused, run.held():
        pass
    busy = f"the run is still running; `recipe cancel {run.path}` stops it at a checkpoint"
    assert str(refused.value) == f"{run.path}: {busy}"
    holder.kill()
    holder.wait()
    assert run.read().state == "interrupted"


@pytest.mark.parametrize(
    ("seconds", "state"), [(-5, "created"), (5, "created"), (-3600, "interrupted"), (3600, "interrupted")]
)
def test_a_run_is_starting_for_seconds_even_if_the_clock_was_set_back(tmp_path, seconds, state):
    created = datetime.now(UTC) + timedelta(seconds=seconds)
    assert a_run(tmp_path / "r", created=created.isoformat()).read().state == state


def test_metrics_are_read_past_damage_and_count_a_repeated_step_once(tmp_path):
    run = a_run(tmp_path / "r")
    lines = [b'{"step":1,"loss":3.0}', b'{"step":2,"loss":2.0}', b"[]", b"{}", b'{"step":2,"eval_loss":2.5}']
    write_metrics(run, *lines, b'{"step":2,"loss":1.9}', b'{"step":3,"max_steps":3}', b'{"step":3,"lo')
    assert [record.get("loss", record.get("eval_loss")) for record in run.read_metrics()] == [3.0, 1.9, 2.5, None]
    assert summarise(run.read_metrics()).step == 3


def test_a_nan_loss_is_shown_and_becomes_null(tmp_path, capsys):
    run = a_run(tmp_path / "r")
    progress = TrainingProgress(run.metrics)
    nothing = float("nan")
    records: list[dict[str, Any]] = [
        {"step": 0, "max_steps": 1, "eval_loss": 2.0, "eval_loss_per_token": 2.1},
        {"step": 1, "max_steps": 1, "loss": nothing, "learning_rate": 0.1},
        {"step": 1, "max_steps": 1, "eval_loss": nothing, "eval_loss_per_token": nothing},
    ]
    write_metrics(run, *map(orjson.dumps, records))
    progress.read()
    assert capsys.readouterr().err == "  step 0: eval loss 2.100\n  step 1: eval loss nan\n"
    assert progress.note == "loss nan  rate 1.00e-01"
    summary = summarise(run.read_metrics())
    assert summary.eval_loss_first == 2.0
    assert summary.eval_loss is None
    assert summary.eval_loss_per_token_first == 2.1
    assert summary.eval_loss_per_token is None


def test_the_last_checkpoint_is_the_newest_valid_one(tmp_path, capsys):
    run = a_run(tmp_path / "r")
    assert run.last_checkpoint() is None
    for step in (9, 10, 11):
        a_checkpoint(run.output, step)
    (run.output / "checkpoint-11" / "optimizer.pt").unlink()
    for name in ("12", "x"):
        (run.output / f"checkpoint-{name}").mkdir()
    assert run.last_checkpoint() == run.output / "checkpoint-10"
    assert capsys.readouterr().err == (
        "checkpoint-12 is damaged and skipped: trainer_state.json is missing or damaged\n"
        "checkpoint-11 is damaged and skipped: optimizer.pt is missing\n"
    )


def test_runs_are_found_by_folder_end_recipe_a_part_of_it_and_latest(tmp_path, capsys):
    runs = tmp_path / "runs"
    names = ("s/wide/20260101-a1", "s/wide/20260102-b1", "s/tall/20260103-c1", "s/x/wide/20260104-d1")
    old, new, other, below = (a_run(runs / name).path for name in names)
    parts = {"s/wide": new, "wide": new, "tall": other, "ta": other, "x/wide": below, "20260101": old}
    parts["wide/20260102-b1/"] = new
    for name, path in parts.items():
        assert rundir.find_run(name, runs).path == path
        assert capsys.readouterr().err == f"run {path}\n"
    full_names = {str(old): old, "s/wide/20260101-a1": old, "latest": below}
    for name, path in full_names.items():
        assert rundir.find_run(name, runs).path == path
        assert capsys.readouterr().err == ""
    assert [rundir.find_run(word, runs).path for word in ("Latest", "late")] == [below, below]
    several = {"wi": "s/wide, s/x/wide", "latets": "latest", "tal1": "tall", "s/wode": "s/wide"}
    for name, near in (several | dict.fromkeys(("1", "z", "", "/"), "")).items():
        with pytest.raises(UserError, match=f"{name}.*{near}"):
            rundir.find_run(name, runs)


def test_each_new_run_has_a_folder_of_its_own(tmp_path):
    folders = set()
    for _ in range(3):
        with rundir.new_run(tmp_path / "runs", "0123456") as (folder, _):
            assert not folder.path.exists()
        folders.add(folder.path)
    assert {path for path in (tmp_path / "runs").iterdir() if path.is_dir()} == folders
    assert len(folders) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from qlora_recipes.run import rundir
from qlora_recipes.training.run_record import Run
from qlora_recipes.training.summary import summarise
from qlora_recipes.training.summary import summarise

with rundir.new_run(Path(sys.argv[1]), "0123456") as (folder, part):
    part.write(Run(recipe="r", recipe_file="r", recipe_sha256="x", cwd="/"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_a_run_is_created_leaves_nothing_once_the_next_is_created(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert rundir.all_runs(tmp_path) == []
    with rundir.new_run(tmp_path, "0123456") as (folder, part):
        assert [*part.path.iterdir()] == []
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.path.name]


def test_a_run_that_was_resumed_from_before_its_newest_records_is_at_its_own_step(tmp_path):
    run = a_run(tmp_path / "r", state="interrupted")
    before = [b'{"step":%d,"loss":%d.0,"step_seconds":1.0}' % (step, 9 - step) for step in range(1, 6)]
    again = [b'{"step":3,"parallelism":"DDP"}', b'{"step":4,"loss":1.0,"step_seconds":1.0}']  # from checkpoint-3
    write_metrics(run, *before, *again)
    summary = run.summary(run.read())
    assert summary.step == 4
    assert summary.loss == 1.0
    assert summary.train_seconds == 4.0
    losses = [(record["step"], record.get("loss")) for record in run.read_metrics()]
    assert losses == [(1, 8.0), (2, 7.0), (3, 6.0), (3, None), (4, 1.0)]


def test_peak_memory_of_a_run_that_goes_on_on_a_gpu_is_that_of_the_gpu(tmp_path):
    run = a_run(tmp_path / "r", state="interrupted")
    on_cpu = b'{"step":1,"loss":2.0,"rss_peak_gib":20.0}'
    write_metrics(run, on_cpu)
    summary = run.summary(run.read())
    assert summary.peak_memory == 20
    assert summary.memory_kind == "resident"
    write_metrics(run, on_cpu, b'{"step":2,"loss":1.0,"memory_reserved_gib":6.0,"peak_gib_by_rank":[6.0,7.0]}')
    summary = run.summary(run.read())
    assert summary.peak_memory == 7
    assert summary.memory_kind == "GPU, reserved"


def test_steps_after_the_last_log_entry_of_a_launch_count_after_a_resume(tmp_path):
    run = a_run(tmp_path / "r", state="interrupted")
    ended = b'{"step":7,"ended":"signal","step_seconds":70.0,"tokens":700,"kept_step":5}'
    write_metrics(run, b'{"step":0,"gpus":[]}', ended, b'{"step":7,"gpus":[]}')
    summary = run.summary(run.read())
    assert summary.train_seconds == 70
    assert summary.tokens_per_second == 10
    assert summary.ended is None
    assert summary.kept_step is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(None, "missing or damaged; the folder has no usable run", id="no file"),
        pytest.param('{"state": ', "missing or damaged; the folder has no usable run", id="not JSON"),
        pytest.param("[1]", "missing or damaged; the folder has no usable run", id="not a mapping"),
        pytest.param("{}", "missing or damaged at version; the folder has no usable run", id="no version"),
        pytest.param(
            '{"version": 1, "recipe": 7}', "missing or damaged at recipe; the folder has no usable run", id="wrong type"
        ),
        pytest.param(
            '{"version": 2}',
            "version 2, but this version of qlora-recipes reads version 1; read it with the version that wrote it, or "
            "start a new run with `recipe run`",
            id="another version",
        ),
    ],
)
def test_an_unusable_record_is_refused(tmp_path, content, problem):
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as refused:
        RunDir(tmp_path).read()
    assert str(refused.value) == f"{file}: {problem}"
