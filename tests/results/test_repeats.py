from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_study
from run_folders import a_run, configure, fields
from small_study import PLAIN, WIDE, row_of

from qlora_recipes.base.files import write_rows
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.evaluate import intervals
from qlora_recipes.results import repeats, study_tables, verdict
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run.rundir import RunDir

RIGHT = [100.0, 0.0, 100.0, 0.0, 100.0, 100.0]


def with_rows(folder: RunDir, right: list[float], first: int = 0) -> RunDir:
    """Give a run the scores of its rows, the number of the first of which is given."""
    rows = [{"row": i, "accuracy": value, "reference": "1", "prediction": "1"} for i, value in enumerate(right, first)]
    write_rows(folder.path / "predictions.jsonl", rows)
    return folder


def with_seed(
    runs: Path, seed: int, right: list[float], name: str = "", recipe_name: str = PLAIN, **more: Any
) -> RunDir:
    """A run of a seed with the scores of its rows; 42 is the recipe's own."""
    changed = ({"seed": seed} if seed != 42 else {}) | more.pop("set", {})
    folder = small_study.ran(runs, recipe_name, name or f"2026-{seed}", np.mean(right), set=changed, **more)
    return with_rows(folder, right)


def test_runs_of_other_seeds_count_as_one(runs):
    folder = with_seed(runs, 42, RIGHT)
    with_seed(runs, 43, [100.0, 0.0, 100.0, 100.0, 100.0, 100.0])
    with_seed(runs, 44, [100.0, 0.0, 0.0, 0.0, 100.0, 100.0])
    row = row_of(runs)
    assert fields(row, "run", "runs") == [str(folder.path), 3]  # the run with the recipe's seed represents it
    assert fields(row, "accuracy", "accuracy_difference") == pytest.approx([100 * 12 / 18, 100 * 12 / 18 - 67.4])
    table = np.array([RIGHT, [100, 0, 100, 100, 100, 100], [100, 0, 0, 0, 100, 100]])
    half = intervals.mean_squares(table).half_width()
    assert fields(row, "accuracy_low", "accuracy_high") == pytest.approx([table.mean() - half, table.mean() + half])
    assert fields(row, "accuracy_interval_method", "accuracy_verdict") == ["rows and 3 runs (Banerjee)", verdict.WITHIN]
    # as for each run, because no row has a chrF
    assert fields(row, "chrf", "chrf_low", "chrf_high") == pytest.approx([20.5, 20, 21])
    assert row["chrf_interval_method"] == "rows and 3 runs (Banerjee)"


@pytest.mark.parametrize(
    ("other", "counted"),
    [
        ({"set": {"lora_r": 64}}, 1),
        ({"set": {"micro_batch_size": True}}, 1),  # not the 1 of the recipe
        ({"gpus_used": 2}, 1),
        ({"state": "interrupted"}, 1),
        ({"settings": {"data_sha256": "y"}}, 1),
        ({"settings": {"rows": 100, "limit": 100}}, 1),
        ({"decoding": small_study.GREEDY}, 1),
        ({"rehearsal": True}, 1),
        ({"named_files": [DataFile(path="zero2.json", sha256="z", bytes=9)]}, 1),
        ({"set": {"output_dir": "other", "dataset_prepared_path": "a", "wandb_project": "p", "use_mlflow": True}}, 2),
    ],
)
def test_a_repeat_differs_in_its_seed_output_and_trackers_only(runs, other, counted):
    with_seed(runs, 42, RIGHT)
    folder = with_seed(runs, 43, [0.0] * 6, **other)
    assert fields(row_of(runs), "runs", "accuracy") == pytest.approx([counted, 400 / 6 / counted])
    folder.config_file.unlink()
    assert row_of(runs)["runs"] == 1


def test_runs_that_lack_their_configs_are_no_repeats(runs):
    for folder in (with_seed(runs, 42, RIGHT), with_seed(runs, 43, RIGHT, set={"lora_r": 64})):
        folder.config_file.unlink()
    assert row_of(runs)["runs"] == 1


def test_one_more_run_of_a_seed_does_not_make_the_interval_narrower(runs):
    with_seed(runs, 42, RIGHT, "a")
    with_seed(runs, 43, [0.0, *RIGHT[1:]], "b")
    before = row_of(runs)
    with_seed(runs, 43, [0.0, *RIGHT[1:]], "c")
    after = row_of(runs)
    assert fields(after, "runs", "accuracy_low") == [2, before["accuracy_low"]]


def test_other_rows_leave_the_spread_of_runs_and_their_own_intervals(runs):
    with_seed(runs, 42, RIGHT)
    with_rows(with_seed(runs, 43, [100.0, *RIGHT[1:4], 0.0, 100.0]), RIGHT, first=1)
    row = row_of(runs)
    assert row["accuracy_interval_method"] == "rows and 2 runs (Banerjee)"
    assert (row["accuracy_low"], row["accuracy_high"]) < (row["accuracy"] - 0.5, row["accuracy"] + 0.5)


def test_equal_scores_of_a_metric_without_rows_have_no_interval(runs):
    for seed in (42, 43):
        with_seed(runs, seed, RIGHT, loss=1.08)
    row = row_of(runs)
    assert row["perplexity"] == pytest.approx(2.945, abs=1e-3)
    assert fields(row, "runs", "perplexity_low", "perplexity_high") == [2, None, None]
    assert row["perplexity_verdict"] == verdict.ACCEPTABLE  # by the tolerance, as for a single run


def test_runs_without_an_interval_have_none_together(runs):
    with_seed(runs, 42, RIGHT[:2], within=None)
    with_seed(runs, 43, RIGHT[1:3], within=None)
    assert fields(row_of(runs), "runs", "accuracy_low") == [2, None]


@pytest.mark.parametrize(
    ("seeds", "method", "lacks_seeds"),
    [
        ([42], "rows only", True),
        ([42, 42], "rows and 2 runs of one seed (Banerjee)", True),
        ([42, 42, 43], "rows and 2 runs (Banerjee)", False),
    ],
)
def test_an_interval_knows_what_it_covers(runs, seeds, method, lacks_seeds):
    for number, seed in enumerate(seeds):
        with_seed(runs, seed, RIGHT, f"2026-{number}")
    (row,) = [row for row in verdict.rows(small_study.read(), runs, False) if row.runs]
    assert row.scores["accuracy"].interval.method == method
    assert row.scores["perplexity"].interval is None
    assert row.lacks_seeds == lacks_seeds


NO_MEAN = f"{PLAIN}: the runs' eval losses cover different or unknown tokens, and have no mean."


@pytest.mark.parametrize("letters", ["abc", "aab", "aa-", "---"])
def test_losses_over_other_tokens_have_neither_mean_nor_verdict(runs, letters):
    for seed, letter, loss in zip((42, 43, 44), letters, (1.4, 0.9, 1.0), strict=True):
        folder = with_seed(runs, seed, RIGHT, loss=loss)
        run = folder.read()
        run.summary.eval_tokens = None if letter == "-" else {"count": 9, "sha256": letter * 64}
        folder.write(run)
    row = row_of(runs)
    assert fields(row, "perplexity", "perplexity_difference", "perplexity_verdict") == [None, None, None]
    assert fields(row, "runs", "eval_loss", "accuracy_verdict") == [3, 1.4, verdict.WITHIN]
    study = small_study.read()
    assert NO_MEAN in [*study_tables.notes(study, verdict.rows(study, runs, False))]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param({}, "the eval loss may cover other tokens than the recipe's, by seed", id="shuffled"),
        pytest.param({"shuffle_merged_datasets": False}, None, id="not shuffled"),
    ],
)
def test_a_mean_of_losses_has_a_verdict_only_if_each_is_comparable(runs, config, reason):
    for seed, loss in ((42, 1.05), (43, 1.1), (44, 1.15)):
        configure(with_seed(runs, seed, RIGHT, loss=loss), val_set_size=0.1, test_datasets=None, **config)
    row = row_of(runs)
    words = verdict.WITHIN if reason is None else None
    assert fields(row, "runs", "incomparable_loss", "perplexity_verdict") == [3, reason, words]
    assert row["perplexity"] == pytest.approx(3.006, abs=1e-3)


def test_a_recipe_that_changed_since_its_run_is_noted(runs):
    with_seed(runs, 42, RIGHT)
    file = Path("recipes", f"{PLAIN}.yaml")
    file.write_text(f"{file.read_text()}# another rate\n")
    study = small_study.read()
    note = f"{PLAIN}: f is missing or has changed since the run began; the run keeps its own config."
    assert note in [*study_tables.notes(study, verdict.rows(study, runs, False))]


def test_one_run_borrows_the_spread_of_published_repeats(runs):
    repeated = [67.4, 68.0, 66.9]
    published = {PLAIN: {"scores": {"accuracy": 67.4}, "repeats": {"accuracy": repeated}}, WIDE: {}}
    small_study.write(Path(), published=published, tolerances={})
    with_seed(runs, 42, RIGHT)
    small_study.ran(runs, WIDE, "a", 70.0)
    row = row_of(runs)
    half = intervals.half_width(np.var(repeated, ddof=1), (0.5 / intervals.NORMAL) ** 2, 2, intervals.MANY)
    assert half > 0.5
    assert row["accuracy_high"] - row["accuracy"] == pytest.approx(half)
    methods = [row_of(runs, name)["accuracy_interval_method"] for name in (PLAIN, WIDE)]
    spread = "a run-to-run standard deviation of 0.55 from 3 published repeats, 66.9 to 68"
    assert methods == [f"rows and {spread} (Banerjee)"] * 2
    with_seed(runs, 43, RIGHT)
    assert row_of(runs)["accuracy_interval_method"] == "rows and 2 runs (Banerjee)"  # a measured spread is better


def test_a_further_decoding_is_the_mean_of_the_runs_that_have_it(runs):
    one, other, _ = (with_seed(runs, seed, RIGHT) for seed in (42, 43, 44))
    small_study.decoded(one, 64.0)
    small_study.decoded(other, 66.0)
    assert row_of(runs)["accuracy_decodings"] == {"greedy": 65}


def test_scores_by_another_judge_are_not_averaged(runs):
    recipe_name = "haider2024/llama-2-7b"
    folders = []
    for name, model, value in (("a", "roberta-large", 0.8), ("b", "other", 0.9)):
        scores = {"rows": 5000, "bleu4": 5.0, "bertscore_f1": value, "bertscore": {"model": model}, "intervals": {}}
        folders.append(a_run(runs, recipe_name, name, 0, scores=scores))
    one, other = (RunResult(folder, folder.read()) for folder in folders)
    columns = one.columns
    assert repeats.mean_score(columns["bleu4"], [one, other]) == (5.0, None)
    assert repeats.mean_score(columns["bertscore_f1"], [one, other]) == (0.8, None)


def test_the_gap_of_a_curve_is_shown(runs, recipe):
    with_seed(runs, 42, RIGHT)  # 2.5 and 1.4, where 2.5 and 1.5 were published
    row = row_of(runs)
    gap = ("train_loss_gap_mean", "train_loss_gap_largest", "train_loss_gap_step")
    assert fields(row, *gap) == pytest.approx([-0.05, 0.1, 4])
    assert row["train_loss_verdict"] is None
    assert fields(row_of(runs, WIDE), *gap) == [None, None, None]
    assert study_tables.CURVES in recipe("results", "sums2030").stdout.splitlines()


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [(0.1, verdict.ACCEPTABLE), (0.09, verdict.OFF)],  # in binary, 0.1 is less than 1.5 - 1.4
)
def test_the_gap_of_a_curve_has_a_verdict_where_the_study_gives_a_tolerance(runs, tolerance, expected):
    small_study.write(Path(), tolerances={"train_loss": tolerance})
    with_seed(runs, 42, RIGHT)
    assert row_of(runs)["train_loss_verdict"] == expected
