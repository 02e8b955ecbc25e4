"""What a backend does with commands, jobs and failures; test_reproduce.py and test_sweep.py have the commands."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import typed
from run_folders import a_run

from qlora_recipes.base import hardware
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request
from qlora_recipes.evaluate.evaluate import EvaluationRequest
from qlora_recipes.plan import plan, step_plan
from qlora_recipes.run import run
from qlora_recipes.run.backends import Command, Local, Step, Task, TaskResult
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.study import pipeline


def task(folder: Path, words: dict[Step, list[str]], asked: list[str]) -> Task:
    """Commands; that they are asked for is noted."""
    folder.mkdir()

    def commands() -> list[Command]:
        asked.append(folder.name)
        return [Command(step, RunDir(folder), line) for step, line in words.items()]

    return Task(TaskResult(folder.name), commands, gpus=0)


def test_jobs_each_see_a_gpu_of_their_own(monkeypatch):
    monkeypatch.setattr(hardware, "visible_gpus", lambda: {"5": {}, "7": {}})
    assert Local(rehearsal=False, jobs=2).devices == ["5", "7"]
    with pytest.raises(UserError, match=r"--jobs 3: .* 2 "):
        Local(rehearsal=False, jobs=3)
    assert Local(rehearsal=True, jobs=3).devices == [None, None, None]


def test_a_command_that_fails_is_the_last_of_its_work_and_of_no_other(tmp_path, capfd):
    asked: list[str] = []
    refused = task(tmp_path / "a", {"run": ["show", "nothing"], "evaluate": ["list"]}, asked)
    fine = task(tmp_path / "b", {"run": ["list"], "evaluate": ["list"]}, asked)
    Local(rehearsal=True, jobs=2).submit([refused, fine], "two")
    assert asked == ["a", "b"]  # once each
    assert refused.result.steps == {"run": "failed"}
    assert refused.result.run is None
    log = tmp_path / "a" / "run.log"
    logs = [log, tmp_path / "b" / "evaluate.log", tmp_path / "b" / "run.log"]
    assert [line.split()[-1] for line in sorted(capfd.readouterr().err.splitlines())] == [*map(str, logs)]
    assert "next:" not in (tmp_path / "b" / "run.log").read_text()  # which `recipe list` says to a user
    assert str(log) in (refused.result.problem or "") and "nothing" in log.read_text()
    assert fine.result.steps == {"run": "done", "evaluate": "done"}
    assert fine.result.problem is None
    assert fine.result.run == tmp_path / "b"


def test_a_pipeline_is_composed_for_the_card_that_is_named(tmp_path):
    asked, backend = Request("haider2024/llama-2-7b", ["packed"]), Local(rehearsal=False, jobs=1)
    for gpu, varlen in (("T4", False), ("A100", True)):
        one = pipeline.Pipeline(TaskResult(gpu), asked, EvaluationRequest(), backend, gpus.find(gpu))
        assert one.composed and one.composed.config["sdpa_varlen"] is varlen


@pytest.mark.parametrize("force", [[], [pipeline.TOO_BIG]])
def test_a_config_that_is_too_big_fails_unless_this_is_overridden(monkeypatch, force):
    for module in (plan, step_plan):
        monkeypatch.setattr(module, "required_gib", lambda *_, **__: 38.1)
    asked, backend, t4 = Request("haider2024/llama-2-7b", force=force), Local(rehearsal=False), gpus.find("T4")
    one = pipeline.Pipeline(TaskResult("one"), asked, EvaluationRequest(), backend, t4)
    assert one.plan() == bool(force)
    assert one.needed_gib == 38.1
    finding = plan._memory_finding({}, t4, 1, trace=False)
    assert finding and finding.name == pipeline.TOO_BIG


@pytest.mark.parametrize("path", ["owner/rows", "rows.jsonl"])
def test_data_on_the_hub_has_a_digest_and_a_missing_file_has_none(path):
    asked = Request("haider2024/llama-2-7b", overrides=typed(f"datasets=[{{path: {path}}}]", "test_datasets=null"))
    one = pipeline.Pipeline(TaskResult("one"), asked, EvaluationRequest(), Local(rehearsal=False))
    assert (one.digest() is None) == (path == "rows.jsonl")


def test_what_axolotl_refuses_is_not_submitted(place, monkeypatch):
    asked = Request("haider2024/llama-2-7b", rehearse=True, overrides=typed("early_stopping_patience=2"))
    result, backend = TaskResult("one"), Local(rehearsal=True, jobs=1)
    one = pipeline.Pipeline(result, asked, EvaluationRequest(), backend)
    assert one.check_config(starts=False)
    assert not one.check_config()
    assert result.steps == {"check": "failed"} and "[axolotl:early_stopping_patience]" in str(result.problem)
    monkeypatch.setattr(backend, "here", False)
    with pytest.raises(UserError, match=r"\[axolotl:early_stopping_patience\]"):
        run.compose_and_check(asked, backend)


def test_the_former_run_of_a_config_is_the_newest_but_a_finished_one_before_others(tmp_path):
    recipe_name = "haider2024/llama-2-7b"
    for name, digest, more in (
        ("1-old", "a", {}),
        ("2-newer", "a", {}),
        ("3-failed", "a", {"state": "failed"}),
        ("4-on-two-gpus", "a", {"gpus_used": 2}),
        ("1-failed", "b", {"state": "failed"}),
        ("2-failed", "b", {"state": "failed"}),
    ):
        a_run(tmp_path, recipe_name, f"{name}-{digest}", 5.0, digest=digest, **more)
    found = pipeline.existing_runs(tmp_path, recipe_name)
    assert {digest: folder.path.name for digest, (folder, _) in found.items()} == {"a": "2-newer-a", "b": "2-failed-b"}


def test_a_run_whose_command_was_killed_before_its_start_is_waited_for_and_resumed(place):
    request = Request("haider2024/llama-2-7b", overrides=typed("datasets=[{path: owner/rows}]", "test_datasets=null"))
    one = pipeline.Pipeline(TaskResult("haider2024/llama-2-7b"), request, EvaluationRequest(), Local(rehearsal=False))
    one.digest()
    folder = run.create(one.composed, request)
    created = datetime.now(UTC) - timedelta(seconds=9.5)
    folder.write(folder.read().model_copy(update={"created": created.isoformat()}))
    assert folder.read().state == "created"
    training, _ = one.task().claim()
    assert training.folder.path == folder.path
    assert one.state == "interrupted"
