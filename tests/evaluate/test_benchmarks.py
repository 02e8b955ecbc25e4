"""Tasks of lm-evaluation-harness, on the model that an evaluation generates with."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import finish, start
from run_folders import configure

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.evaluate import benchmarks, evaluate
from qlora_recipes.evaluate.evaluate import EvaluationRequest
from qlora_recipes.evaluate.evaluation_rows import sample_positions
from qlora_recipes.evaluate.scores_file import RowShares, Scores
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import ScoreRecord
from qlora_recipes.metrics.registry import BenchmarkParameters
from qlora_recipes.run import rundir

GROUP: dict[str, Any] = {
    "results": {
        "grp": {"alias": "grp", "acc,none": 0.6, "acc_stderr,none": 0.05},
        "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.03, "f1,strict": 0.1, "f1_stderr,strict": "N/A"},
        "b": {"alias": "b", "acc,none": 0.9, "acc_stderr,none": 0.04, "f1,strict": 0.3, "f1_stderr,strict": "N/A"},
    },
    "configs": {"a": {}, "b": {}},
    "versions": {"grp": 2, "a": 1, "b": 1},
    "n-shot": {"a": 5, "b": 5},
    "higher_is_better": {"grp": {"acc": True}, "a": {"acc": True, "f1": True}},
    "n-samples": {"a": {"original": 300}, "b": {"original": 100}},
}


@pytest.mark.parametrize(
    ("parameters", "value", "stderr"),
    [
        ({"task": "grp"}, 60, 5),
        ({"task": "grp", "mean_of_tasks": True}, 70, 2.5),
        ({"task": "grp", "mean_of_tasks": True, "result": "f1,strict"}, 20, None),
    ],
)
def test_a_group_is_scored_as_the_harness_or_as_the_mean_of_its_tasks(parameters, value, stderr):
    benchmark = benchmarks.summarise(GROUP, BenchmarkParameters(**parameters), [2])
    assert benchmark.value == pytest.approx(value)
    assert benchmark.stderr == (stderr and pytest.approx(stderr))
    assert benchmark.version == "2"
    assert benchmark.shots == 5
    assert benchmark.rows == 400


@pytest.mark.parametrize(
    ("share", "error", "expected"),
    [(0.5, 0.1, [30.4, 69.6]), (1.0, 0.0, [75.75, 100]), (0.0, 0.0, [0, 24.25]), (0.98, 0.02, [94.08, 100])],
)
def test_a_benchmark_of_0_or_100_percent_has_an_interval_within_its_range(share, error, expected):
    results = {"a": {"acc,none": share, "acc_stderr,none": error}}
    counts = {"configs": {"a": {}}, "n-samples": {"a": {"original": 12, "effective": 12}}}
    benchmark = benchmarks.summarise(GROUP | counts | {"results": results}, BenchmarkParameters(task="a"), [2])
    assert benchmark.interval == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("result", ["exact_match", "word_perplexity", "bpb", "bleu"])
def test_a_result_that_is_missing_or_no_share_is_refused(result):
    other = {"word_perplexity,none": 15.3, "bpb,none": 0.7, "bleu,none": 27.0}
    report = GROUP | {"results": {"a": other}, "higher_is_better": {"a": {"bpb": False}}}
    with pytest.raises(WorkFailed):  # after generation: a UserError would remove a published adapter's run
        benchmarks.summarise(report, BenchmarkParameters(task="a", result=result), [2])


def test_a_task_is_a_column_of_its_name():
    (column,) = registry.requested(["benchmark:some/my-task.yaml"]).values()
    assert column.name == "my_task"
    assert column.label == "my_task, %"


@pytest.mark.parametrize(("limit", "is_kept"), [(5, True), (None, False), (6, False)])
def test_a_benchmark_of_other_rows_is_measured_anew(limit, is_kept):
    columns = registry.requested(["benchmark:grp"])
    scored = benchmarks.summarise(GROUP, BenchmarkParameters(task="grp"), [2], 5)
    record = ScoreRecord(value=scored.value, declaration=columns["grp"].entry, benchmark=scored)
    former = Scores(scores={"grp": record}, shares=RowShares(rows=0))
    assert bool(benchmarks.valid_benchmarks(columns, former, limit)) == is_kept
    assert benchmarks.valid_benchmarks({}, former, limit)  # not asked for again


def a_task(place: Path, **more: Any) -> Path:
    """File of a task with its rows in a file beside it.

    One choice of each row is far longer, and so less likely: merged weights, which are rounded, change no answer.
    """
    choices = [" 4", " four, or perhaps some number that is a little larger"]
    rows = [{"question": f"{i} less is", "choices": choices, "label": int(i % 3 == 0)} for i in range(20)]
    (place / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 3},
    } | more
    (place / "texts.py").write_text('def question(row):\n    return row["question"]\n')
    content = yamlfiles.write_yaml(task) + "doc_to_text: !function texts.question\n"
    (place / "sums.yaml").write_text(content)
    return place / "sums.yaml"


@pytest.mark.long
def test_a_task_scores_as_by_the_harness_itself_also_when_resumed(tmp_path, fake_axolotl, recipe, tiny, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answer, batches = HFLM._model_call, list[int]()

    def interrupted(model: HFLM, rows: Any, *arguments: Any, **more: Any) -> Any:
        if len(batches) == 1:
            batches.append(0)
            raise KeyboardInterrupt
        batches.append(len(rows))
        return answer(model, rows, *arguments, **more)

    monkeypatch.setattr(HFLM, "_model_call", interrupted)
    words = ("run", "haider2024/llama-3.2-3b", "--rehearse", "--set", f"base_model={tiny}")
    finish(start(tmp_path, *words, command=fake_axolotl))
    (run,) = rundir.all_runs(tmp_path / "runs")
    evaluate = ("evaluate", "latest", "--max-new-tokens", "8", "--metric", "bertscore:none")
    for name in ("no_such_task", "ai2_arc", "leaderboard_math_hard", "humaneval"):  # the last runs generated code
        recipe.fails(*evaluate, "--metric", f"benchmark:{name}")
    assert not (run.path / "predictions.jsonl").exists()
    task = a_task(tmp_path)
    recipe.fails(*evaluate, "--metric", f"benchmark:{task}")  # names a function
    wanted = (*evaluate, "--metric", f"benchmark:{task}", "--force", "task-code:sums")
    assert recipe(*wanted).returncode != 0 and not (run.path / "scores.json").exists()
    scores = recipe.json(*wanted)
    benchmark = scores["sums_benchmark"]
    assert benchmark["version"] == "3"
    assert benchmark["shots"] == 0
    assert benchmark["rows"] == 12
    assert benchmark["total_rows"] == 20
    assert benchmark["result"] == "acc"
    assert scores["notes"][0] == "12 of 26 rows; sums: 12 of 20 rows"
    resumed = sum(batches)  # the batch before the interruption is not answered again
    assert recipe("publish", "latest", "--merge").returncode == 0
    model = HFLM(str(run.output / "merged"), dtype="bfloat16", device="cpu")
    tasks = TaskManager(include_path=str(tmp_path))
    rows = sample_positions(20, 12)
    theirs = simple_evaluate(model, tasks=["sums"], task_manager=tasks, samples={"sums": rows})["results"]["sums"]
    before = sum(batches)
    assert (
        scores["sums"]
        == benchmark["value"]
        == pytest.approx(100 * theirs["acc,none"])
        == pytest.approx(100 * sum(i % 3 > 0 for i in rows) / 12)
    )
    assert benchmark["stderr"] == pytest.approx(100 * theirs["acc_stderr,none"])
    assert "sums" in recipe.json(*evaluate)  # kept
    recipe.ok(*wanted, "--adapter", "none")
    assert sum(batches) == before + resumed
    (row,) = recipe.json("results")
    assert row["sums"] == scores["sums"] and row["sums_base_model"] is not None
    assert "sums, %, base model" in recipe("results").stdout


@pytest.mark.long
def test_generated_answers_end_as_the_runs_predictions(run, tiny, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    generate, answers = HFLM._model_generate, list[list[int]]()

    def generated(model: HFLM, context: Any, *arguments: Any, **more: Any) -> Any:
        tokens = generate(model, context, *arguments, **more)
        answers.extend(tokens[:, context.shape[1] :].tolist())
        return tokens

    monkeypatch.setattr(HFLM, "_model_generate", generated)
    ends = [2, *range(300, 700)]
    generation = {"output_type": "generate_until", "generation_kwargs": {"until": ["no such"], "max_gen_toks": 12}}
    task = a_task(tmp_path, metric_list=[{"metric": "exact_match"}], **generation)
    request = EvaluationRequest(adapter="none", limit=8, metrics=[f"benchmark:{task}"], force=["task-code:sums"])
    configure(run, datasets=[{"path": "x.jsonl", "type": "completion"}], test_datasets=None)  # no rows with answers
    GenerationConfig(eos_token_id=ends).save_pretrained(tiny)
    try:
        first = evaluate.evaluate_run(run, request)
        task.write_text(task.read_text().replace("version: 3", "version: 4"))
        again = evaluate.evaluate_run(run, request)
    finally:
        (tiny / "generation_config.json").unlink()
    lengths = [next(i for i, token in enumerate(answer) if token in ends) for answer in answers]
    assert len({*lengths}) > 1  # some rows end before others of their batch
    assert all(set(answer[i + 1 :]) <= {2} for i, answer in zip(lengths, answers, strict=True))
    assert first.shares.rows == 0
    assert first.scores["sums"].benchmark.ends == ends
    assert again.scores["sums"].benchmark.version == "4"
    assert len(answers) == 8  # cached answers, not generated again
