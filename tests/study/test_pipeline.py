"""Commands, jobs and failures on this machine; test_reproduce.py and test_sweep.py have the commands."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import typed
from run_folders import a_run

from qlora_recipes.base import files, hardware
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request
from qlora_recipes.evaluate.evaluate import EvaluationRequest
from qlora_recipes.plan import step_plan
from qlora_recipes.run import run
from qlora_recipes.run.backends import Command, Step, Task, TaskResult
from qlora_recipes.run.backends.local import Local
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.study import pipeline

NAME = "haider2024/llama-2-7b"


def task(folder: Path, words: dict[Step, list[str]], claimed: list[str]) -> Task:
    """Task with these commands; records in `claimed` that it is claimed."""
    folder.mkdir()
    result = TaskResult(folder.name)

    def commands() -> list[Command]:
        claimed.append(folder.name)
        return [Command(step, RunDir(folder), line, result) for step, line in words.items()]

    return Task(result, commands, {}, gpus=0)


def test_jobs_each_see_a_gpu_of_their_own(monkeypatch):
    monkeypatch.setattr(hardware, "visible_gpus", lambda: {"5": {}, "7": {}})
    assert Local(rehearsal=False, jobs=2).devices == ["5", "7"]
    with pytest.raises(UserError) as refused:
        Local(rehearsal=False, jobs=3)
    assert str(refused.value) == "--jobs 3: each job needs its own GPU; 2 available on this machine"
    assert Local(rehearsal=True, jobs=3).devices == [None, None, None]


def test_a_command_that_fails_is_the_last_of_its_task_and_of_no_other(tmp_path, capfd):
    claimed: list[str] = []
    failing = task(tmp_path / "a", {"run": ["show", "nothing"], "evaluate": ["list"]}, claimed)
    fine = task(tmp_path / "b", {"run": ["list"], "evaluate": ["list"]}, claimed)
    Local(rehearsal=True, jobs=2).submit([failing, fine], "two")
    assert claimed == ["a", "b"]  # once each
    log = tmp_path / "a" / "run.log"
    assert failing.result.steps == {"run": "failed"}
    assert failing.result.problem == f"the training failed; see {log}"
    assert failing.result.run is None
    logs = [log, tmp_path / "b" / "evaluate.log", tmp_path / "b" / "run.log"]
    assert [line.split()[-1] for line in sorted(capfd.readouterr().err.splitlines())] == [*map(str, logs)]
    assert "recipe: nothing: " in log.read_text()
    assert "next:" not in (tmp_path / "b" / "run.log").read_text()  # which `recipe list` suggests to a user
    assert fine.result.steps == {"run": "done", "evaluate": "done"}
    assert fine.result.problem is None
    assert fine.result.run == tmp_path / "b"


def pipeline_of(request: Request, gpu: gpus.Gpu | None = None) -> pipeline.Pipeline:
    backend = Local(rehearsal=request.rehearse)
    return pipeline.Pipeline(TaskResult(request.name), request, EvaluationRequest(), backend, gpu)


@pytest.mark.parametrize(("gpu", "varlen"), [("T4", False), ("A100", True)])
def test_a_pipeline_is_composed_for_the_named_gpu(gpu, varlen):
    assert pipeline_of(Request(NAME, ["packed"]), gpus.find_gpu(gpu)).composed.config["sdpa_varlen"] is varlen


def test_an_invalid_config_has_no_pipeline_but_a_result():
    result = TaskResult(NAME)
    request = Request(NAME, overrides=typed("output_dir=x"))
    assert pipeline.pipelines_of([(result, request)], EvaluationRequest(), Local(rehearsal=False)) == []
    assert result.steps == {"check": "failed"}
    reason = "`recipe run` sets output_dir; --runs selects the folder of runs, and `recipe resume` continues a run"
    assert result.errors == [f"--set output_dir=x: {reason}"]


@pytest.mark.parametrize("force", [[], [pipeline.TOO_BIG]])
def test_a_config_that_is_too_big_fails_unless_this_is_overridden(monkeypatch, force):
    monkeypatch.setattr(step_plan, "required_gib", lambda *_, **__: 38.1)
    t4 = gpus.find_gpu("T4")
    planned = pipeline_of(Request(NAME, force=force), t4)
    assert planned.plan() == bool(force)
    assert planned.needed_gib == 38.1
    assert pipeline.TOO_BIG == "too-big:micro_batch_size"  # as in test_check


def with_rows(path: str) -> Request:
    return Request(NAME, overrides=typed(f"datasets=[{{path: {path}}}]", "test_datasets=null"))


def test_data_on_the_hub_has_a_digest_and_a_missing_file_has_none():
    assert pipeline_of(with_rows("owner/rows")).digest()
    assert pipeline_of(with_rows("rows.jsonl")).digest() is None


def test_a_config_that_axolotl_refuses_is_not_submitted(place, monkeypatch, validates_here):
    request = Request(NAME, rehearse=True, overrides=typed("early_stopping_patience=2"))
    refused = pipeline_of(request)
    assert refused.check_config(starts=False)
    assert not refused.check_config()
    assert refused.result.steps == {"check": "failed"}
    (error,) = refused.result.errors
    assert error.endswith(" [axolotl:early_stopping_patience]")
    with pytest.raises(UserError) as raised:
        run.compose_and_check(request, refused.backend)
    assert str(raised.value) == error


def test_the_existing_run_of_a_config_is_the_newest_but_a_finished_one_before_others(tmp_path):
    for name, digest, more in (
        ("1-old", "a", {}),
        ("2-newer", "a", {}),
        ("3-failed", "a", {"state": "failed"}),
        ("4-on-two-gpus", "a", {"gpus_used": 2}),
        ("1-failed", "b", {"state": "failed"}),
        ("2-failed", "b", {"state": "failed"}),
    ):
        a_run(tmp_path, NAME, f"{name}-{digest}", 5.0, digest=digest, **more)
    existing = pipeline.existing_runs(tmp_path, NAME)
    names = {digest: folder.path.name for digest, (folder, _) in existing.items()}
    assert names == {"a": "2-newer-a", "b": "2-failed-b"}


def test_a_run_whose_command_was_killed_before_its_start_is_waited_for_and_resumed(place):
    request = with_rows("owner/rows")
    waiting = pipeline_of(request)
    waiting.digest()
    folder = run.create(waiting.composed, request)
    created = datetime.now(UTC) - timedelta(seconds=9.5)
    folder.write(folder.read().model_copy(update={"created": created.isoformat()}))
    assert folder.read().state == "created"
    training, _ = waiting.task().claim()
    assert training.folder.path == folder.path
    assert waiting.state == "interrupted"


def test_databases_that_a_metric_lacks_are_missed_before_the_training(place):
    rows = [{"user": "How many?", "segments": [{"label": True, "text": "SELECT 1"}], "database": "concert"}]
    for split in ("train", "test"):
        files.write_rows(Path(f"data/dbgpt-spider/{split}.jsonl"), rows)
    asked = pipeline_of(Request("dbgpt-spider/llama-2-7b-chat-lora"))
    assert not asked.check_rows()
    folder = "data/dbgpt-spider-raw/test-suite/database"
    assert str(asked.result.problem).splitlines()[-1] == (  # after those of this machine
        f"{folder}: databases: no SQLite file of the database concert; expected {folder}/NAME.sqlite or "
        f"{folder}/NAME/*.sqlite"
    )
