"""Comparisons of runs, and of files of predictions."""

import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import ADAPTER, a_run, evaluated

from qlora_recipes.base import paths
from qlora_recipes.base.files import Row, write_rows
from qlora_recipes.evaluate import intervals, score
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import ScorerRecord
from qlora_recipes.results import compare
from qlora_recipes.results.compare import ScoredRows
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import Summary

DEFAULT = registry.columns(dict.fromkeys(("bleu4", "rouge_l", "bertscore_f1")))
PLAIN = {name: DEFAULT[name] for name in ("bleu4", "rouge_l")}
LLAMA_2 = "haider2024/llama-2-7b"


def rows(*texts: str, **fields: list[Any]) -> list[Row]:
    """Scored rows with these predictions, and further fields."""
    table = [{"row": i, "reference": f"rename variable {i} please", "prediction": text} for i, text in enumerate(texts)]
    for name, values in fields.items():
        for row, value in zip(table, values, strict=True):
            row[name] = value
    return score.with_scores(table, PLAIN, {})


def trained(place: Path, name: str, rate: float = 2e-4, **changes: Any) -> RunDir:
    """A run that is not evaluated; its learning rate changes the losses from the second step on."""
    run = a_run(place / "runs", LLAMA_2, name, 5.0, set={"learning_rate": rate}, **changes)
    write_rows(run.metrics, [{"step": 1, "loss": 2.0}, *({"step": n, "loss": 2.0 / n + rate} for n in range(2, 7))])
    (run.path / "scores.json").unlink()
    return run


def predicted(place: Path, name: str, **changes: Any) -> RunDir:
    """A run that is trained and evaluated, with predictions."""
    run = trained(place, name, **changes)
    run.output.mkdir()
    (run.output / ADAPTER).write_text("x")
    evaluated(run, {"bleu4": 5.0})
    write_rows(run.path / "predictions.jsonl", rows("rename variable", "why", idx=[0, 1]))
    return run


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Files of predictions, and runs with different parts of a training and an evaluation."""
    write_rows(tmp_path / "a.jsonl", rows("rename variable", "why"))
    write_rows(tmp_path / "b.jsonl", rows("x", "y"))
    write_rows(tmp_path / "one-row.jsonl", rows("x"))
    write_rows(tmp_path / "other.jsonl", [row | {"reference": "other"} for row in rows("x", "y")])
    write_rows(tmp_path / "idx-1.jsonl", rows("x", idx=[1]))
    write_rows(tmp_path / "idx-2.jsonl", rows("x", idx=[2]))
    predicted(tmp_path, "evaluated")
    predicted(tmp_path, "stopped").metrics.unlink()
    other_rows = [row | {"reference": "other"} for row in rows("x", "y", idx=[0, 1])]
    write_rows(predicted(tmp_path, "other-rows").path / "predictions.jsonl", other_rows)
    trained(tmp_path, "trained")
    trained(tmp_path, "faster", rate=3e-4)
    trained(tmp_path, "rehearsal", rehearsal=True)
    metrics = {"mmlu": {"metric": "benchmark", "task": "mmlu"}}
    evaluated(trained(tmp_path, "benchmark"), {"rows": 0, "mmlu": 40.0, "metrics": metrics, "intervals": {}}, rows=0)


def test_rows_are_compared_that_both_have():
    a = rows("rename variable", "why", "rename it please", "nit", idx=[7, 8, 9, 11])
    b = rows("nit", "x", "rename", "nit", idx=[7, 8, 9, 10])
    bleu4, rouge_l = compare.compare(ScoredRows(a, PLAIN), ScoredRows(b[::-1], PLAIN))
    of_a, of_b = ([row["bleu4"] for row in side[:3]] for side in (a, b))
    means = {"a": pytest.approx(sum(of_a) / 3), "b": pytest.approx(sum(of_b) / 3)}
    assert bleu4 == {"score": "bleu4", "rows": 3, **means, **intervals.paired(of_a, of_b)}
    assert rouge_l["score"] == "rouge_l"


def test_rows_without_positions_are_compared_in_their_order():
    a, b = rows("a", "b"), rows("c", "d")
    assert compare.pair(a, b) == [(a[0], b[0]), (a[1], b[1])]


JUDGE, OTHER = (ScorerRecord(model="m", layer=9, revision=revision, hash="x") for revision in ("1", "2"))


@pytest.mark.parametrize(("of_a", "of_b", "metrics"), [(JUDGE, JUDGE, 3), (JUDGE, OTHER, 2), (JUDGE, None, 2)])
def test_bertscores_are_compared_only_by_the_same_scorer_model(of_a, of_b, metrics):
    columns = PLAIN | {"bertscore_f1": DEFAULT["bertscore_f1"]}
    scored = [row | {"bertscore_f1": 0.8} for row in rows("x", "y")]
    a, b = (ScoredRows(scored, columns, {"bertscore_f1": scorer}) for scorer in (of_a, of_b))
    assert len(compare.compare(a, b)) == metrics


def test_scores_that_a_file_brings_along_are_not_believed(tmp_path):
    write_rows(
        tmp_path / "a.jsonl", [{"reference": "a b c d", "prediction": "a b c d", "bleu4": 0.01, "bertscore_f1": 9}]
    )
    (of_file,) = compare.score_sides([tmp_path / "a.jsonl"], ["bleu4"])
    (row,) = of_file.rows
    assert row["bleu4"] == pytest.approx(100)
    assert "bertscore_f1" not in row


RUNS = f"runs/{LLAMA_2}"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        pytest.param(
            "a.jsonl",
            "no",
            "no: no run, sweep, study or recipe of that name below runs/; there are "
            + ", ".join(folder.name for folder in paths.studies()),
            id="missing",
        ),
        pytest.param(
            "a.jsonl",
            "one-row.jsonl",
            "cannot match 2 rows and 1 rows: some lack a unique position in the field idx",
            id="other number of rows",
        ),
        pytest.param(
            "a.jsonl",
            "other.jsonl",
            "row 0 has different references; compare predictions for the same rows",
            id="other references",
        ),
        pytest.param(
            "idx-1.jsonl", "idx-2.jsonl", "no row in common; compare predictions for the same rows", id="other rows"
        ),
        pytest.param(
            f"{RUNS}/trained",
            "a.jsonl",
            f"a: its scores are missing or stale, and not compared; first run `recipe evaluate {RUNS}/trained`",
            id="not evaluated",
        ),
        pytest.param(
            f"{RUNS}/evaluated",
            f"{RUNS}/rehearsal",
            "rehearsals and real runs are not comparable; name only one kind",
            id="rehearsal",
        ),
    ],
)
def test_what_cannot_be_compared(files, recipe, a, b, message):
    assert recipe.fails("results", a, b).stderr == f"recipe: {message}\n"


@pytest.mark.parametrize(
    "metric", ["bertscore:roberta-large", "bertscore_f1", "perplexity", "benchmark:mmlu", "sacrebleu"]
)
def test_metrics_that_do_not_score_rows_are_not_compared(files, recipe, metric):
    assert recipe.fails("results", "a.jsonl", "b.jsonl", "--metric", metric).stderr == (
        f"recipe: --metric {metric}: to compare metrics of whole files or by a scorer model, run `recipe evaluate RUN "
        "--metric` for both runs\n"
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        pytest.param(
            "evaluated",
            "faster",
            f"b: its scores are missing or stale, and not compared; first run `recipe evaluate {RUNS}/faster`",
            id="not evaluated",
        ),
        pytest.param(
            "evaluated",
            "other-rows",
            "scores of a and b are not compared: row 0 has different references; compare predictions for the same rows",
            id="other rows",
        ),
        pytest.param(
            "evaluated",
            "benchmark",
            "scores of a and b are not compared: no metric of rows in common; `--metric NAME` adds one to all",
            id="no common metric",
        ),
    ],
)
def test_what_is_left_out_is_logged(files, recipe, a, b, message):
    *logged, suggested = recipe.ok("results", f"{RUNS}/{a}", f"{RUNS}/{b}").stderr.splitlines()
    assert logged == [message]
    assert suggested == f"next: recipe report {RUNS}/{a} {RUNS}/{b}"


def test_several_metrics_are_compared_with_a_warning(files, recipe):
    message = "intervals and p values of 2 comparisons are not corrected for multiple comparisons"
    metrics = "--metric", "bleu4", "--metric", "rouge_l"
    assert recipe.ok("results", "a.jsonl", "b.jsonl", *metrics).stderr == f"{message}\n"


def test_a_run_and_a_file_are_compared_by_their_scores(files, recipe):
    compared = recipe.json("results", "evaluated", "b.jsonl")
    assert (compared["trainings"], compared["settings"]) == ({}, {})
    assert [row["better"] for row in compared["scores"] if row["score"] == "bleu4"] == [1]


def test_runs_are_compared_by_trainings_and_scores(files, recipe):
    compared = recipe.json("results", "evaluated", "evaluated")
    assert (compared["trainings"], compared["settings"]) == ({"b": EQUAL}, {})
    assert {row["score"]: row["difference"] for row in compared["scores"]} == {"bleu4": 0}
    assert compared["runs"]["a"] == compared["runs"]["b"]
    assert (compared["runs"]["a"]["run"], [*compared["intervals"]["a"]]) == (f"{RUNS}/evaluated", ["bleu4"])


EQUAL = {"first": 1, "last": 6, "step": None, "losses": None}


def test_bertscores_of_runs_come_from_their_evaluations(recipe, tmp_path):
    for name, value in (("one", 0.8), ("two", 0.9)):
        run = predicted(tmp_path, name)
        evaluated(run, {"bertscore_f1": value, "bertscore": {"model": "m"}}, rows=2, total_rows=9)
        write_rows(run.path / "predictions.jsonl", [row | {"bertscore_f1": value} for row in rows("x", "y")])
    (compared,) = recipe.json("results", f"{RUNS}/one", f"{RUNS}/two")["scores"]
    assert (compared["score"], compared["difference"]) == ("bertscore_f1", pytest.approx(-0.1))
    notes = [f"{RUNS}/{name}: 2 of 9 rows" for name in ("one", "two")]
    assert recipe("results", f"{RUNS}/one", f"{RUNS}/two").stderr.splitlines()[:-1] == notes


def test_losses_without_a_common_step_are_not_compared(files, recipe):
    assert recipe.json("results", "evaluated", "stopped")["trainings"] == {"b": None}
    sentence = "Losses of the first run and b are not compared: the two runs recorded none over the same steps."
    assert sentence in recipe.ok("results", "evaluated", "stopped").stdout.splitlines()


def test_equal_trainings_logged_at_other_steps_do_not_differ(files, recipe, tmp_path):
    losses = [2.0, 1.9, 1.8, 1.7, 1.6, 1.5]
    by_one, by_five = tmp_path / RUNS / "trained" / "metrics.jsonl", tmp_path / RUNS / "faster" / "metrics.jsonl"
    write_rows(by_one, [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    write_rows(by_five, [{"step": 1, "loss": 2.0}, {"step": 6, "loss": 1.7}])  # the mean of steps 2 to 6
    assert recipe.json("results", "trained", "faster")["trainings"] == {"b": EQUAL | {"last": 1}}


def test_losses_over_other_tokens_have_a_note(recipe, tmp_path):
    for name, letter in (("one", "a"), ("same", "a"), ("other", "b")):
        tokens = {"count": 100, "sha256": letter * 64}
        trained(tmp_path, name, summary=Summary(eval_loss_per_token=1.5, eval_loss=1.5, eval_tokens=tokens))
    note = "The eval losses cover different or unknown tokens, so they are not comparable."
    for other, notes in (("same", 0), ("other", 1)):
        assert recipe.ok("results", "one", other).stdout.splitlines().count(note) == notes


def test_runs_of_pairs_need_no_evaluation(recipe, tmp_path):
    pairs = {"eval_loss": 0.6, "eval_reward_accuracy": 0.75, "eval_pairs": {"count": 100, "sha256": "a" * 64}}
    for name in ("one", "two"):
        run = a_run(tmp_path / "runs", "start/dpo-qlora", name, 5.0, summary=Summary(**pairs))
        (run.path / "scores.json").unlink()
    compared = recipe.ok("results", "one", "two")
    assert "evaluate" not in compared.stderr
    rows = {score: values for score, *values in (re.split("  +", line) for line in compared.stdout.splitlines()[5:8])}
    accuracy = "75.0000 (65.7 to 82.5)"
    assert rows == {"pairs": ["100"] * 2, "eval loss": ["0.6000"] * 2, "reward accuracy, %": [accuracy] * 2}


def test_each_run_is_compared_with_the_first(files, recipe):
    compared = recipe.json("results", "trained", "faster", "evaluated", "a.jsonl")
    assert [*compared["runs"]] == ["a", "b", "c"]
    assert compared["settings"] == {"learning_rate": {"a": 2e-4, "b": 3e-4, "c": 2e-4}}
    assert compared["trainings"] == {"b": EQUAL | {"step": 2, "losses": [1.0002, 1.0003]}, "c": EQUAL}
    ((score, c, d),) = [(row["score"], row["c"], row["d"]) for row in compared["scores"] if row["score"] == "bleu4"]
    assert (score, c) == ("bleu4", d)


def test_a_comparison_shows_losses_settings_and_curves(files, recipe, tmp_path):
    for name, loss in (("trained", 1.5), ("faster", 1.4996)):
        metrics = tmp_path / RUNS / name / "metrics.jsonl"
        first, last = ({"step": step, "eval_loss_per_token": loss + 1 - step / 6} for step in (0, 6))
        write_rows(metrics, [first, {"step": 1, "loss": 2.0}, {"step": 6, "loss": 1.0}, last])
        (tmp_path / RUNS / name / "run.json").write_text(
            (tmp_path / RUNS / name / "run.json").read_text().replace('"state": "finished"', '"state": "failed"')
        )
    assert recipe("results", "trained", "faster").stdout.splitlines() == [
        f"a: {RUNS}/trained",
        f"b: {RUNS}/faster",
        "",
        "Losses and scores",
        "score                           a       b",
        "first eval loss            2.5000  2.4996",
        "eval loss, nats per token  1.5000  1.4996",
        "",
        "Settings that differ",
        "setting             a       b",
        "learning_rate  0.0002  0.0003",
        "",
        "Eval loss by step",
        "step       a       b",
        "   0  2.5000  2.4996",
        "   6  1.5000  1.4996",
        "",
        "The losses of the first run and b in steps 1 to 6 are equal.",
        "",
    ]


def test_versions_and_machine_are_among_what_differs(recipe, tmp_path):
    for name, torch, driver, ranks in (("one", "2.14.1", "580", 1), ("two", "2.15.0", "590", 2)):
        machine = {"packages": {"torch": torch}, "python": "3.13", "gpus": [{"name": "T4", "driver": driver}]}
        trained(tmp_path, name, provenance=machine, gpus_used=ranks)
    assert recipe.json("results", "one", "two")["settings"] == {
        "provenance.packages.torch": {"a": "2.14.1", "b": "2.15.0"},
        "provenance.gpus.0.driver": {"a": "580", "b": "590"},
        "ranks": {"a": 1, "b": 2},
    }


def test_diff_compares_the_configs_of_runs(files, recipe):
    one, two = (f"{RUNS}/{name}/config.yaml" for name in ("trained", "faster"))
    assert recipe.json("diff", "trained", f"{RUNS}/faster") == [{"key": "learning_rate", one: 2e-4, two: 3e-4}]
