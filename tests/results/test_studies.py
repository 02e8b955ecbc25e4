"""Results of a study of another kind, and of several studies beside each other."""

import re
from pathlib import Path

import pytest
import small_study
from run_folders import a_run, fields
from small_study import PLAIN, WIDE, row_of

from qlora_recipes.base.errors import UserError
from qlora_recipes.data import studies
from qlora_recipes.data.published import TRAIN_LOSS, PublishedScore, read_points
from qlora_recipes.evaluate.intervals import Interval
from qlora_recipes.results import compare, listing, study_tables, verdict
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
    of_ours = Interval(*interval) if interval else None
    assert verdict.verdict(ours, of_ours, PublishedScore(value=published, spread=spread), tolerance) == expected


@pytest.mark.parametrize(
    ("printed", "text", "value", "margin"),
    [
        ("42.30", "42.30", 42.3, 0.005),
        ("42.3", "42.3", 42.3, 0.05),
        ("42", "42", 42, 0.5),
        ("{value: 42.30, spread: 0.10}", "42.30 ± 0.10", 42.3, 0.11),
    ],
)
def test_a_published_number_keeps_the_digits_that_study_yaml_has(runs, recipe, printed, text, value, margin):
    file = Path("recipes", "sums2030", "study.yaml")
    file.write_text(file.read_text().replace("accuracy: 70\n", f"accuracy: {printed}\n"))
    studies._load.cache_clear()
    score = small_study.read().published[WIDE].scores["accuracy"]
    assert str(score) == text
    assert score.margin == pytest.approx(margin, abs=1e-6)
    assert f" {text}\n" in recipe.ok("results", "sums2030").stdout
    assert recipe.json("results", "sums2030")[1]["accuracy_published"] == value


@pytest.mark.parametrize(
    ("published", "value", "bounds"),
    [
        ("67.4", "66.00", "65.50 to 66.50"),
        ("67.40", "66.00", "65.50 to 66.50"),
        ("67.4000", "66.0000", "65.5000 to 66.5000"),
    ],
)
def test_our_score_has_no_fewer_decimals_than_the_published(runs, recipe, published, value, bounds):
    scores = {"accuracy": float(published)}
    small_study.write(Path(), published={PLAIN: {"scores": scores}})
    file = Path("recipes", "sums2030", "study.yaml")
    file.write_text(file.read_text().replace("accuracy: 67.4\n", f"accuracy: {published}\n"))
    studies._load.cache_clear()
    small_study.ran(runs, PLAIN, "a", 66.0)
    (line,) = [line for line in recipe.ok("results", "sums2030").stdout.splitlines() if bounds in line]
    assert line.startswith(f"{PLAIN}  {value.rjust(11)}  {bounds}")


def test_every_published_metric_has_a_verdict(runs):
    small_study.ran(runs, PLAIN, "a", 66.0, loss=1.1)
    row = row_of(runs)
    assert fields(row, "accuracy", "accuracy_low", "accuracy_high") == [66.0, 65.5, 66.5]
    assert fields(row, "accuracy_published", "accuracy_spread", "accuracy_verdict") == [67.4, 1.0, verdict.WITHIN]
    assert row["accuracy_difference"] == pytest.approx(-1.4)
    assert row["perplexity"] == pytest.approx(3.004, abs=1e-3)  # exp(1.1), of the run: it needs no evaluation
    assert fields(row, "perplexity_low", "perplexity_verdict") == [None, verdict.ACCEPTABLE]
    assert fields(row, "chrf", "chrf_published", "chrf_verdict") == [20.5, None, None]
    assert fields(row_of(runs, WIDE), "accuracy", "accuracy_published") == [None, 70]


@pytest.mark.parametrize("key", ["test_datasets.0.path", "val_set_size"])
def test_an_eval_loss_of_other_rows_is_not_compared(runs, key):
    small_study.ran(runs, PLAIN, "a", 66.0, set={key: "x"})
    row = row_of(runs)
    assert row["accuracy_verdict"] == verdict.WITHIN
    assert row["perplexity"] == pytest.approx(3.004, abs=1e-3)
    assert fields(row, "perplexity_difference", "perplexity_verdict") == [None, None]


def test_a_score_by_another_declaration_of_the_metric_is_not_compared(runs):
    folder = small_study.ran(runs, PLAIN, "a", 66.0)
    small_study.write(Path(), metrics={"accuracy": {"metric": "number"}, "perplexity": {}, "chrf": {}})
    names = ("run", "accuracy", "accuracy_verdict", "chrf")
    assert fields(row_of(runs), *names) == [str(folder.path), None, None, 20.5]


def test_costs_stand_beside_the_published(runs, recipe):
    small_study.ran(runs, PLAIN, "a", 66.0)
    row = row_of(runs)
    assert fields(row, "trainable", "trainable_published") == [9175040, 9175040]
    assert fields(row, "peak_gpu_memory_gib", "peak_gpu_memory_gib_published") == [19.5, 20.0]
    assert fields(row, "train_seconds", "train_seconds_published") == [600, 585.2]
    assert fields(row, "tokens_per_second", "tokens_per_second_published") == [7000, 7198]
    costs = [line.split() for line in recipe("results", "sums2030").stdout.splitlines() if "9,175,040" in line]
    assert costs == [f"{PLAIN} 20.50 1.10 9,175,040 9,175,040 19.50 20.00 7,000 7,198 600 585 0.1667".split()]


ONE_SEED = (
    "Intervals of one run or one seed do not cover other seeds; `recipe reproduce sums2030 --seeds 3` runs each recipe "
    "with three seeds."
)
OPEN = (
    "Unreported hyperparameters: decoding: {max_new_tokens: 64, do_sample: true, temperature: 0.1, "
    "top_p: 0.95, top_k: 40} (the paper does not state it)"
)


@pytest.mark.parametrize(
    ("run", "tolerances", "notes"),
    [
        pytest.param({}, {}, [ONE_SEED], id="one seed"),
        pytest.param({"accuracy": 67.0, "within": None}, {}, [], id="no interval"),
        pytest.param({"accuracy": 60.0}, {}, [ONE_SEED, f"{PLAIN} is off in accuracy, %. {OPEN}"], id="off"),
        pytest.param(
            {"loss": 1.5}, {"perplexity": 0.1}, [ONE_SEED, f"{PLAIN} is off in perplexity. {OPEN}"], id="off in one"
        ),
        pytest.param(
            {"accuracy": 60.0},
            {"train_loss": 0.09},
            [ONE_SEED, f"{PLAIN} is off in accuracy, % and training loss. {OPEN}"],
            id="off in two",
        ),
        pytest.param(
            {"set": {"lora_r": 64}},
            {},
            [ONE_SEED, f"{PLAIN} differs from the paper: lora_r: 64 instead of 32"],
            id="differs",
        ),
        pytest.param(
            {"published_adapter": "a/b"},
            {},
            [ONE_SEED, f"{PLAIN}: scores of the adapter a/b, which was not trained here."],
            id="published adapter",
        ),
        pytest.param(
            {"set": {"val_set_size": 0.1}},
            {},
            [
                ONE_SEED,
                f"{PLAIN} is not compared with the published eval loss: the eval loss may cover other tokens than the "
                "recipe's, by val_set_size.",
            ],
            id="other tokens",
        ),
    ],
)
def test_notes_on_a_study(runs, run, tolerances, notes):
    small_study.write(Path(), unreported=["decoding"], tolerances=tolerances)
    small_study.ran(runs, PLAIN, "a", **{"accuracy": 66.0} | run)
    study = small_study.read()
    shown = study_tables.notes(study, verdict.rows(study, runs, False))
    assert [*shown] == ["All recipes: The authors tokenize prompt and answer together", *notes]


def test_a_curve_is_compared_over_the_same_steps(runs):
    curve = read_points(small_study.read().folder / "plain.csv", TRAIN_LOSS)
    assert curve == [(2, 2.5), (4, 1.5)]
    metrics = [{"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 2.5), (3, 1.0))]
    metrics.insert(2, {"step": 2, "eval_loss": 9.0})
    assert compare.curve_gap(metrics, curve) == CurveGap(0.25, 0.25, 2)  # step 4 is not reached


def test_a_damaged_curve_is_refused(runs):
    file = small_study.read().folder / "plain.csv"
    file.write_text("step,loss\n1,2\n")
    with pytest.raises(UserError) as error:
        read_points(file, TRAIN_LOSS)
    columns = "expected the columns step and train_loss with a number in each row"
    assert str(error.value) == f"{file}: {columns} (KeyError('train_loss'))"


def test_a_further_decoding_is_a_column_of_its_own(runs, recipe):
    folder = small_study.ran(runs, PLAIN, "a", 66.0)
    assert row_of(runs)["accuracy_decodings"] == {"greedy": None}
    small_study.decoded(folder, 64.5)
    row = row_of(runs)
    assert fields(row, "accuracy", "accuracy_decodings") == [66, {"greedy": 64.5}]
    assert row["accuracy_difference"] == pytest.approx(-1.4)
    for words in (["results"], ["results", "sums2030"]):
        table = recipe(*words).stdout
        assert re.findall(r"accuracy, %, greedy|64\.50", table) == ["accuracy, %, greedy", "64.50"]


def test_a_table_of_a_group_needs_a_score(runs, recipe):
    metrics = {name: column.entry for name, column in studies.find("dora-commonsense").columns.items()}
    scores = {"rows": 12, "average": 25.0, "boolq": 50.0, "metrics": metrics, "intervals": {}}
    a_run(runs, "dora-commonsense/llama-2-7b-lora", "a", 0, scores=scores, rehearsal=True)
    table = recipe("results", "dora-commonsense", "--rehearse").stdout
    assert re.findall(r"^recipe +(\S+)", table, re.MULTILINE)[:2] == ["average", "BoolQ,"]


def test_no_difference_from_the_paper_is_listed_for_rehearsals(runs, recipe):
    folder = small_study.ran(runs, PLAIN, "a", 66.0)
    folder.write(folder.read().model_copy(update={"rehearsal": True}))
    assert recipe.ok("results", "sums2030", "--rehearse").stdout.count("The authors tokenize") == 0
    assert recipe.ok("results", "sums2030").stdout.count("The authors tokenize") == 1


@pytest.mark.parametrize(
    ("rehearsal", "title"), [(True, listing.REHEARSALS), (False, "A. Nobody; published scores are on Test Subset 1")]
)
def test_a_studys_table_names_rehearsals_or_the_study(rehearsal, title, runs):
    folder = small_study.ran(runs, PLAIN, "a", 66.0)
    folder.write(folder.read().model_copy(update={"rehearsal": rehearsal}))
    study = small_study.read()
    tables = [*study_tables.tables_of(study, verdict.rows(study, runs, rehearsal), rehearsal)]
    assert tables[0].title == f"{title}: accuracy, %"
    assert tables[1].title == "perplexity"
    assert [table.title for table in tables].count(study_tables.baselines(study).title) == (0 if rehearsal else 1)


def test_numbers_of_different_metrics_never_share_a_column(runs, recipe):
    small_study.ran(runs, PLAIN, "a", 66.0)
    a_run(runs, LLAMA_2, "b", 5.0)
    scores = {"rows": 9, "accuracy": 12.5, "metrics": {"accuracy": {"metric": "number"}}, "intervals": {}}
    folder = a_run(runs, LLAMA_2, "c", 0, scores=scores)
    folder.write(folder.read().model_copy(update={"recipe": "mine"}))
    parts = recipe("results").stdout.strip().split("\n\n")
    shown = [re.findall("accuracy, %|BLEU-4|right numbers, %", part) for part in parts]
    assert shown == [["accuracy, %"], ["BLEU-4"], ["right numbers, %"]]
    rows = recipe.json("results")
    assert [(row["study"], row["accuracy"]) for row in rows if "accuracy" in row] == [("sums2030", 66), (None, 12.5)]


def test_metrics_of_one_kind_never_share_a_heading(runs):
    results = []
    for name, word, value in (("a", "yes", 12.5), ("b", "no", 37.5)):
        metrics = {"choice": {"words": [["x"]]}, "other": {"metric": "choice", "words": [[word]]}}
        scores = {"rows": 9, "choice": 87.5, "other": value, "metrics": metrics, "intervals": {}}
        folder = a_run(runs, PLAIN, name, 0, scores=scores)
        results.append(RunResult(folder, folder.read()))
    table, _ = listing._tables(results)
    headings = [heading for heading in table.rows[0] if "choices" in heading and "base model" not in heading]
    shown = [[row[heading] for heading in headings] for row in table.rows]
    assert shown == [[87.5, 12.5, None], [87.5, None, 37.5]]


def test_study_yaml_says_what_the_authors_report(runs):
    small_study.ran(runs, PLAIN, "a", 66.0, set={"lora_r": 64})
    small_study.write(Path(), reported=["lora_r"], unreported=["lora_r"])
    assert fields(row_of(runs), "differs", "unreported") == [["lora_r: 64 instead of 32"], []]
    published = {PLAIN: {"scores": {"accuracy": 67.4, "perplexity": 3.0}, "unreported": ["lora_r"]}}
    small_study.write(Path(), reported=["lora_r"], unreported=["lora_r"], published=published)
    assert fields(row_of(runs), "differs", "unreported") == [[], ["lora_r: 64 (--set lora_r=64)"]]
