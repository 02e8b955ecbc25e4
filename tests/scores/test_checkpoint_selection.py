import re
from pathlib import Path

import pytest
import torch
from run_folders import a_tiny_run
from safetensors.torch import save_file

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.data.study import Decoding
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import checkpoint_selection
from qlora_recipes.scores.checkpoint_selection import select
from qlora_recipes.scores.evaluate import EvaluationRequest
from qlora_recipes.scores.evaluations import ADAPTER, Evaluation, EvaluationSettings

STEPS = (2, 4, 6, 8, 10)
Scores = dict[str, tuple[float, float]]  # by checkpoint, on validation and on test rows


@pytest.fixture
def run(tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path) -> RunDir:
    """A run of the tiny Llama with five checkpoints, the last of which is its adapter."""
    folder = a_tiny_run(tmp_path, tiny, tiny_profile, sample)
    for step in STEPS:
        (folder.output / f"checkpoint-{step}").mkdir()
        save_file({"lora": torch.full((1,), step)}, folder.output / f"checkpoint-{step}" / ADAPTER)
    save_file({"lora": torch.full((1,), STEPS[-1])}, folder.output / ADAPTER)
    return folder


def scored_as(scores: Scores, monkeypatch: pytest.MonkeyPatch, test: Path) -> list[str]:
    """Have evaluations give these scores, reading the test rows where they are of these; returns what was asked."""
    asked = []

    def evaluated(folder: RunDir, request: EvaluationRequest) -> Evaluation:
        name = Path(request.adapter).name if request.adapter else "checkpoint-10"
        asked.append(f"{name}: {'validation' if request.validation else 'test'}")
        value = scores[name][0 if request.validation else 1]
        data = "valid.jsonl" if request.validation else str(test)
        settings = EvaluationSettings(
            base_model="m", adapter=name, adapter_sha256=name, data=data, data_sha256="d", rows=8, total_rows=8,
            batch_size=1, decoding=Decoding(max_new_tokens=8), built_with={}, quantized=True, dtype="float32",
        )  # fmt: skip
        intervals = {"bleu4": [value - 1, value + 1]}
        made = {"rows": 8, "bleu4": value, "intervals": intervals, "metrics": {"bleu4": {"metric": "bleu4"}}}
        return Evaluation(made="", rehearsal=False, scores=made, version=1, files={}, data=[], settings=settings)

    monkeypatch.setattr(checkpoint_selection, "evaluate", evaluated)
    return asked


VALUES = {
    f"checkpoint-{step}": (valid, 50 - valid) for step, valid in zip(STEPS, (3.0, 9.0, 7.0, 9.0, 1.0), strict=True)
}


def test_the_best_is_that_on_validation_rows_and_has_the_only_test_score(run, sample, monkeypatch, recipe):
    asked = scored_as(VALUES, monkeypatch, sample / "test.jsonl")
    done = recipe("evaluate", run.path, "--checkpoints", "--metric", "benchmark:mmlu", "--metric", "exact_match")
    assert asked == [*(f"checkpoint-{step}: validation" for step in STEPS), "checkpoint-4: test"]
    told = " ".join(done.stdout.split())
    assert re.search(
        "checkpoint-4 .*BLEU-4 .*valid.jsonl, 8 rows.* 41.00, 95 % 40.00 to 42.00.*test.jsonl, 8 rows", told
    )
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("checkpoint-")][:5]
    assert [row[0] for row in rows if "best" in row] == ["checkpoint-4"]


@pytest.mark.parametrize("on_test_rows", [False, True])
def test_a_run_that_does_not_validate_or_on_test_rows_has_no_best(run, sample, monkeypatch, on_test_rows):
    asked = scored_as(VALUES, monkeypatch, sample / "test.jsonl")
    cfg = yamlfiles.read_yaml(run.config)
    del cfg["test_datasets"]
    on_test = {"test_datasets": [{"path": str(sample / "test.jsonl"), "type": "alpaca", "split": "train[:4]"}]}
    run.config.write_text(yamlfiles.write_yaml(cfg | (on_test if on_test_rows else {})))
    with pytest.raises(UserError, match="--adapter"):
        select(run, EvaluationRequest())
    assert not asked


def test_where_there_are_no_other_rows_the_best_has_no_test_score(run, tmp_path, sample, monkeypatch):
    asked = scored_as(VALUES, monkeypatch, sample / "test.jsonl")
    record = run.read()
    record.test_data = None
    record.recipe = "own"
    run.write(record)
    (own := tmp_path / "own.jsonl").write_bytes((sample / "valid.jsonl").read_bytes())
    cfg = yamlfiles.read_yaml(run.config)
    entries = {key: [cfg[key][0] | {"path": str(own), "split": "train"}] for key in ("datasets", "test_datasets")}
    run.config.write_text(yamlfiles.write_yaml(cfg | entries))
    assert select(run, EvaluationRequest(metrics=["benchmark:mmlu"])).test_rows is None
    assert len(asked) == 5
    select(run, EvaluationRequest(data=sample / "test.jsonl"))
    assert asked[-1] == "checkpoint-4: test"


def test_rows_without_a_score_select_no_checkpoint(run, sample, monkeypatch):
    scored_as(VALUES, monkeypatch, sample / "test.jsonl")
    evaluated = checkpoint_selection.evaluate
    metrics = {"bleu4": {"metric": "bleu4"}}
    no_mean = {"scores": {"bleu4": None, "intervals": {}, "metrics": metrics}}  # as a mean of groups that lacks a group
    monkeypatch.setattr(checkpoint_selection, "evaluate", lambda *words: evaluated(*words).model_copy(update=no_mean))
    with pytest.raises(UserError, match=r"BLEU-4 has no score on valid\.jsonl, 8 rows; raise --limit"):
        select(run, EvaluationRequest(limit=8))


def test_a_truncated_checkpoint_is_left_out_and_a_run_without_any_is_refused(run, sample, monkeypatch, capsys):
    asked = scored_as(VALUES | {"output": (99.0, 1.0)}, monkeypatch, sample / "test.jsonl")
    damaged = run.output / "checkpoint-4" / ADAPTER
    damaged.write_bytes(damaged.read_bytes()[:-100])
    select(run, EvaluationRequest())
    assert f"checkpoint-4: no complete {ADAPTER}" in capsys.readouterr().err
    assert asked[-1] == "checkpoint-8: test"
    save_file({"other": torch.ones(1)}, run.output / ADAPTER)  # of a later step, as with early stopping
    monkeypatch.setitem(VALUES, "checkpoint-10", (1.0, 1.0))
    assert [row.checkpoint for row in select(run, EvaluationRequest()).checkpoints][-1] == "final"
    for file in run.output.rglob(ADAPTER):
        file.unlink()
    with pytest.raises(UserError, match="saves_per_epoch"):
        select(run, EvaluationRequest())


def test_what_does_not_go_with_checkpoints_is_refused(run, recipe):
    for option, value in (("--adapter", "none"), ("--engine", "http://host")):
        refused = recipe.fails("evaluate", run.path, "--checkpoints", option, value)
        assert option in refused.stderr
