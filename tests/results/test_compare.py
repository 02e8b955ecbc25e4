from pathlib import Path
from typing import Any

import orjson
import pytest
from run_folders import ADAPTER, a_run, evaluated

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_rows
from qlora_recipes.evaluate import intervals, score
from qlora_recipes.evaluate.score import columns_of
from qlora_recipes.metrics.metric import ScorerRecord
from qlora_recipes.results import compare
from qlora_recipes.results.compare import ScoredRows
from qlora_recipes.run.rundir import RunDir

USUAL = columns_of()
PLAIN = {name: USUAL[name] for name in ("bleu4", "rouge_l")}


def rows(*texts: str, **more: list[Any]) -> list[dict[str, Any]]:
    made = [{"row": i, "reference": f"rename variable {i} please", "prediction": text} for i, text in enumerate(texts)]
    for name, values in more.items():
        made = [row | {name: value} for row, value in zip(made, values, strict=True)]
    return score.with_scores(made, PLAIN, {})


def test_a_comparison_is_of_the_same_rows():
    a = rows("rename variable", "why", "rename it please", "nit", idx=[7, 8, 9, 11])
    b = rows("nit", "x", "rename", "nit", idx=[7, 8, 9, 10])
    compared = compare.compare(ScoredRows(a, PLAIN), ScoredRows(list(reversed(b)), PLAIN))
    assert [row["score"] for row in compared] == ["bleu4", "rouge_l"]
    expected = intervals.paired([row["bleu4"] for row in a[:3]], [row["bleu4"] for row in b[:3]])
    assert compared[0] == {"score": "bleu4", "rows": 3, "a": pytest.approx(sum(r["bleu4"] for r in a[:3]) / 3),
                           "b": pytest.approx(sum(r["bleu4"] for r in b[:3]) / 3)} | expected  # fmt: skip


def test_bertscores_are_compared_only_where_one_judge_made_both():
    a, b = ([row | {"bertscore_f1": value} for row in rows("x", "y")] for value in (0.8, 0.9))
    judge, other = (ScorerRecord(model="m", layer=9, revision=revision, hash="x") for revision in ("1", "2"))
    for left, right, count in ((judge, judge, 3), (judge, other, 2), (None, None, 2), (judge, None, 2)):
        columns = PLAIN | {"bertscore_f1": USUAL["bertscore_f1"]}
        of_a, of_b = (ScoredRows(rows, columns, {"bertscore_f1": by}) for rows, by in ((a, left), (b, right)))
        made = compare.compare(of_a, of_b)
        assert len(made) == count


def test_scores_that_a_file_brings_along_are_not_believed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(orjson.dumps({"reference": "a b c d", "prediction": "a b c d", "bleu4": 0.01, "bertscore_f1": 9}))
    (of_file,) = compare.score_sides([file])
    (row,) = of_file.rows
    assert row["bleu4"] == pytest.approx(100) and "bertscore_f1" not in row


def test_rows_are_matched_by_position_or_order_and_others_are_refused():
    assert len(compare.pair(rows("a", "b"), rows("c", "d"))) == 2
    other = [row | {"reference": "something else"} for row in rows("a", "b")]
    for left, right, named in (
        (rows("a", "b"), rows("c"), "2 rows and 1"),
        (rows("a", "b"), other, "row 0 "),
        (rows("a", idx=[1]), rows("a", idx=[2]), "no row "),
    ):
        with pytest.raises(UserError, match=named):
            compare.pair(left, right)


def test_the_command_compares_files(recipe, tmp_path):
    for name, made in (("a.jsonl", rows("rename variable", "why")), ("b.jsonl", rows("x", "y"))):
        (tmp_path / name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in made))
    assert recipe.json("results", "a.jsonl", "b.jsonl")["scores"][0]["better"] == 1
    recipe.fails("results", "a.jsonl", "nowhere.jsonl")
    for metric in ("bertscore:roberta-large", "bertscore_f1", "perplexity", "benchmark:mmlu", "sacrebleu"):
        recipe.fails("results", "a.jsonl", "b.jsonl", "--metric", metric)


LLAMA_2 = "haider2024/llama-2-7b"
PREDICTIONS = [{"row": n, "reference": f"rename {n} please", "prediction": f"rename {n}", "idx": n} for n in range(4)]


def trained(place: Path, name: str, rate: float = 2e-4, predicted: bool = True, **more: Any) -> RunDir:
    """A run in a folder of work, whose learning rate shows from the second step's loss on."""
    run = a_run(place / "runs", LLAMA_2, name, 5.0, set={"learning_rate": rate}, **more)
    write_rows(run.metrics, ({"step": n, "loss": 2.0 / n + (rate if n > 1 else 0)} for n in range(1, 7)))
    run.output.mkdir()
    (run.output / ADAPTER).write_text(str(rate))
    if predicted:
        write_rows(run.path / "predictions.jsonl", PREDICTIONS)
    else:
        (run.path / "scores.json").unlink()
    return run


def test_runs_that_are_not_evaluated_are_compared_by_their_trainings(recipe, tmp_path):
    for name, rate in (("one", 2e-4), ("two", 2e-4), ("other", 3e-4)):
        trained(tmp_path, name, rate, predicted=False)
    equal = {"first": 1, "last": 6, "step": None, "losses": None, "differences": {}}
    assert recipe.json("results", "one", "two") == {"training": equal, "scores": None}
    other = recipe.json("results", "one", "other")["training"]
    assert other["step"] == 2
    assert other["losses"] == [1.0002, 1.0003]
    assert other["differences"] == {"learning_rate": [2e-4, 3e-4]}


def test_runs_without_a_metric_of_rows_in_common_are_compared_by_their_trainings(recipe, tmp_path):
    metrics = {"mmlu": {"metric": "benchmark", "task": "mmlu"}}
    for name in ("one", "two"):
        run = trained(tmp_path, name, predicted=False)
        evaluated(run, {"rows": 0, "mmlu": 40.0, "metrics": metrics, "intervals": {}}, rows=0)
    compared = recipe.json("results", "one", "two")
    assert compared["training"] and compared["scores"] == []
    recipe.ok("results", "one", "two")


def test_both_parts_are_shown_where_both_are_there(recipe, tmp_path):
    for name in ("one", "two"):
        run = trained(tmp_path, name)
    compared = recipe.json("results", "one", "two")
    assert compared["training"] and "bleu4" in {row["score"] for row in compared["scores"]}
    write_rows(tmp_path / "p.jsonl", PREDICTIONS)
    run.metrics.unlink()
    for other in ("p.jsonl", "two"):  # without a training
        compared = recipe.json("results", "one", other)
        assert compared["training"] is None and compared["scores"]
    (run.path / "predictions.jsonl").unlink()
    recipe.fails("results", "one", "two")


def test_versions_and_machine_are_among_what_differs(recipe, tmp_path):
    for name, torch, driver, ranks in (("one", "2.14.1", "580", 1), ("two", "2.15.0", "590", 2)):
        machine = {"packages": {"torch": torch}, "python": "3.13", "gpus": [{"name": "T4", "driver": driver}]}
        trained(tmp_path, name, provenance=machine, gpus_used=ranks)
    assert recipe.json("results", "one", "two")["training"]["differences"] == {
        "provenance.packages.torch": ["2.14.1", "2.15.0"],
        "provenance.gpus.0.driver": ["580", "590"],
        "ranks": [1, 2],
    }


def test_a_rehearsal_is_not_compared_with_a_real_run(recipe, tmp_path):
    for name, rehearsal in (("one", True), ("two", False)):
        trained(tmp_path, name, rehearsal=rehearsal)
    recipe.fails("results", "one", "two")
