"""Results of a study of another kind, and of several studies beside each other."""

import re
from pathlib import Path

import pytest
import small_study
from run_folders import a_run
from small_study import PLAIN, WIDE, row_of

from qlora_recipes.base.errors import UserError
from qlora_recipes.data import studies
from qlora_recipes.data.published import PublishedScore
from qlora_recipes.evaluate.intervals import Interval
from qlora_recipes.results import compare, listing, verdict
from qlora_recipes.results.compare import CurveGap
from qlora_recipes.results.run_result import RunResult

LLAMA_2 = "haider2024/llama-2-7b"


@pytest.mark.parametrize(
    ("ours", "interval", "published", "spread", "tolerance", "expected"),
    [
        (66.0, [65.0, 67.0], 67.4, None, None, verdict.OFF),
        (66.0, [65.0, 68.0], 67.4, None, None, verdict.WITHIN),
        (66.0, [65.0, 67.0], 67.4, 1.0, None, verdict.WITHIN),  # 66.4 to 68.4 is theirs
        (64.0, [63.0, 65.0], 67.4, 1.0, None, verdict.OFF),
        (64.0, [63.0, 65.0], 67.4, 1.0, 4.0, verdict.ACCEPTABLE),
        (66.5, None, 67.4, 1.0, None, verdict.WITHIN),
        (66.0, None, 67.4, 1.0, None, verdict.OFF),
        (67.4, None, 67.4, None, 2.0, verdict.ACCEPTABLE),
        (67.4, None, 67.4, None, None, None),  # nothing says how near is near enough
        (5.18, None, 5.02, None, 0.16, verdict.ACCEPTABLE),  # 5.18 - 5.02 is 0.16000000000000014 in binary
        (5.186, None, 5.02, None, 0.16, verdict.OFF),  # 5.025 is the largest number that is printed as 5.02
        (52.0, [51.0, 53.066], 53.07, None, None, verdict.WITHIN),
        (52.0, [51.0, 53.064], 53.07, None, None, verdict.OFF),
        (52.0, [51.0, 53.02], 53.1, None, None, verdict.OFF),
        (52.0, [51.0, 53.06], 53.1, None, None, verdict.WITHIN),
        (68.53, None, 67.4, 1.0, None, verdict.OFF),
        (68.49, None, 67.4, 1.0, None, verdict.WITHIN),  # 67.449 ± 1.049 is printed so
    ],
)
def test_a_published_spread_widens_what_is_within(ours, interval, published, spread, tolerance, expected):
    within = Interval(*interval, "rows only") if interval else None
    assert verdict.verdict(ours, within, PublishedScore(value=published, spread=spread), tolerance) == expected


@pytest.mark.parametrize(
    ("printed", "margin"), [("42.30", 0.005), ("42.3", 0.05), ("42", 0.5), ("{value: 42.30, spread: 0.10}", 0.11)]
)
def test_a_published_number_keeps_the_digits_that_study_yaml_has(runs, recipe, printed, margin):
    file = Path("recipes", "sums2030", "study.yaml")
    file.write_text(file.read_text().replace("accuracy: 70\n", f"accuracy: {printed}\n"))
    studies._load.cache_clear()
    score = small_study.read().published[WIDE].scores["accuracy"]
    text = {"{": "42.30 ± 0.10"}.get(printed[0], printed)
    assert str(score) == text
    assert score.margin == pytest.approx(margin, abs=1e-6)
    assert f" {text}\n" in recipe.ok("results", "sums2030").stdout
    assert recipe.json("results", "sums2030")[1]["accuracy_published"] == float(printed.split(",")[0].split()[-1])


def test_every_published_metric_has_a_verdict(runs):
    small_study.ran(runs, PLAIN, "a", 66.0, loss=1.1)
    row = row_of(runs)
    assert row["accuracy"] == 66.0
    assert row["accuracy_low"] == 65.5
    assert row["accuracy_high"] == 66.5
    assert row["accuracy_published"] == 67.4
    assert row["accuracy_spread"] == 1.0
    assert row["accuracy_difference"] == pytest.approx(-1.4)
    assert row["accuracy_verdict"] == verdict.WITHIN
    assert row["perplexity"] == pytest.approx(3.004, abs=1e-3)  # exp(1.1), of the run: it needs no evaluation
    assert row["perplexity_low"] is None
    assert row["perplexity_verdict"] == verdict.ACCEPTABLE
    assert row["chrf"] == 20.5
    assert row["chrf_published"] is None
    assert row["chrf_verdict"] is None
    assert row_of(runs, WIDE)["accuracy_published"] == 70 and row_of(runs, WIDE)["accuracy"] is None


def test_an_eval_loss_of_other_rows_is_not_compared(runs):
    for key, name in (("test_datasets.0.path", "a"), ("val_set_size", "b")):
        small_study.ran(runs, PLAIN, name, 66.0, set={key: "x"})
        row = row_of(runs)
        assert row["perplexity"] and row["accuracy_verdict"] == verdict.WITHIN
        assert row["perplexity_difference"] is row["perplexity_verdict"] is None


def test_a_score_by_another_declaration_of_the_metric_is_not_compared(runs):
    folder = small_study.ran(runs, PLAIN, "a", 66.0)
    small_study.write(Path(), metrics={"accuracy": {"metric": "number"}, "perplexity": {}, "chrf": {}})
    row = row_of(runs)
    assert row["run"] == str(folder.path)
    assert row["accuracy"] is None
    assert row["accuracy_verdict"] is None
    assert row["chrf"] == 20.5


def test_what_was_measured_and_how_the_loss_ended_stand_beside_the_published(runs, recipe):
    small_study.ran(runs, PLAIN, "a", 66.0)
    row = row_of(runs)
    assert row["trainable"] == 9175040
    assert row["trainable_published"] == 9175040
    assert row["peak_gpu_memory_gib"] == 19.5
    assert row["peak_gpu_memory_gib_published"] == 20.0
    assert row["train_seconds"] == 600
    assert row["train_seconds_published"] == 585.2
    assert row["tokens_per_second"] == 7000
    assert row["tokens_per_second_published"] == 7198
    table = recipe("results", "sums2030").stdout
    assert "9,175,040" in table and "585" in table
    assert small_study.read().differences[0] in table
    assert "67.4 ± 1.0" in table


def test_a_curve_is_compared_over_the_same_steps(runs):
    of_study = small_study.read()
    curve = compare.published_curve(of_study, of_study.published[PLAIN])
    assert curve == [(2, 2.5), (4, 1.5)]
    metrics = [{"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 2.5), (3, 1.0))]
    metrics.insert(2, {"step": 2, "eval_loss": 9.0})
    assert compare.curve_gap(metrics, curve) == CurveGap(0.25, 0.25, 2)  # step 4 is not reached
    assert compare.published_curve(of_study, of_study.published[WIDE]) == []
    Path("recipes/sums2030/plain.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match=r"plain\.csv"):
        compare.published_curve(of_study, of_study.published[PLAIN])


def test_a_further_decoding_is_a_column_of_its_own(runs, recipe):
    folder = small_study.ran(runs, PLAIN, "a", 66.0)
    assert row_of(runs)["accuracy_greedy"] is None
    small_study.decoded(folder, 64.5)
    row = row_of(runs)
    assert row["accuracy"] == 66
    assert row["accuracy_greedy"] == 64.5
    assert row["accuracy_difference"] == pytest.approx(-1.4)
    assert "accuracy, %, greedy" in recipe("results").stdout and "64.50" in recipe("results").stdout
    assert "greedy" in recipe("results", "sums2030").stdout


def test_a_table_of_a_group_needs_a_score(runs, recipe):
    metrics = {name: column.entry for name, column in studies.find("dora-commonsense").columns.items()}
    scores = {"rows": 12, "average": 25.0, "boolq": 50.0, "metrics": metrics, "intervals": {}}
    a_run(runs, "dora-commonsense/llama-2-7b-lora", "a", 0, scores=scores, rehearsal=True)
    table = recipe("results", "dora-commonsense", "--rehearse").stdout
    assert "BoolQ" in table
    assert "PIQA" not in table
    assert re.findall(r"^recipe +(\S+)", table, re.MULTILINE)[:2] == ["average", "BoolQ,"]


def test_numbers_of_different_metrics_never_share_a_column(runs, recipe):
    small_study.ran(runs, PLAIN, "a", 66.0)
    a_run(runs, LLAMA_2, "b", 5.0)
    own = {"rows": 9, "accuracy": 12.5, "metrics": {"accuracy": {"metric": "number"}}, "intervals": {}}
    folder = a_run(runs, LLAMA_2, "c", 0, scores=own)
    folder.write(folder.read().model_copy(update={"recipe": "mine"}))
    parts = recipe("results").stdout.strip().split("\n\n")
    names = ("accuracy, %", "BLEU-4", "right numbers, %")
    shown = [[name for name in names if name in part] for part in parts]
    assert {name for found in shown for name in found} == {*names} and max(map(len, shown)) == 1
    rows = recipe.json("results")
    found = [(row["study"], row["accuracy"]) for row in rows if "accuracy" in row]
    assert found == [("sums2030", 66), (None, 12.5)]


def test_metrics_of_one_kind_never_share_a_heading(runs):
    found = []
    for name, word, value in (("a", "yes", 12.5), ("b", "no", 37.5)):
        metrics = {"choice": {"words": [["x"]]}, "other": {"metric": "choice", "words": [[word]]}}
        scores = {"rows": 9, "choice": 87.5, "other": value, "metrics": metrics, "intervals": {}}
        folder = a_run(runs, PLAIN, name, 0, scores=scores)
        found.append(RunResult(folder, folder.read()))
    table, _ = listing._tables(found)
    shown = [[value for heading, value in row.items() if "choices" in heading] for row in table.rows]
    assert shown == [[87.5, 12.5, None], [87.5, None, 37.5]]


def test_a_study_says_how_its_authors_statements_begin(runs):
    small_study.ran(runs, PLAIN, "a", 66.0, set={"lora_r": 64})
    assert row_of(runs)["differs"] == ["lora_r: 64 instead of 32"]  # a comment that begins with "paper"
    small_study.write(Path(), comment_prefixes=["the appendix"], open_settings=["lora_r"])
    row = row_of(runs)
    assert row["differs"] == [] and row["open"] == ["lora_r: 64 (--set lora_r=64)"]
