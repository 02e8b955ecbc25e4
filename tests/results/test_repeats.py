from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_study
from run_folders import a_run
from small_study import PLAIN, WIDE, row_of

from qlora_recipes.base.files import write_rows
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.evaluate import intervals
from qlora_recipes.evaluate.scores_file import read_scores
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
    own = with_seed(runs, 42, RIGHT)
    with_seed(runs, 43, [100.0, 0.0, 100.0, 100.0, 100.0, 100.0])
    with_seed(runs, 44, [100.0, 0.0, 0.0, 0.0, 100.0, 100.0])
    row = row_of(runs)
    assert row["run"] == str(own.path)
    assert row["runs"] == 3  # that of the recipe's seed speaks
    assert row["accuracy"] == pytest.approx(100 * 12 / 18)
    assert row["accuracy_difference"] == pytest.approx(100 * 12 / 18 - 67.4)
    assert row["accuracy_interval_method"] == "rows and 3 runs"
    table = np.array([RIGHT, [100, 0, 100, 100, 100, 100], [100, 0, 0, 0, 100, 100]])
    half = intervals.mean_squares(table).half_width()
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((table.mean() - half, table.mean() + half))
    assert row["chrf"] == 20.5
    assert row["chrf_interval_method"] == "rows and 3 runs"
    assert (row["chrf_low"], row["chrf_high"]) == pytest.approx((20, 21))  # as for each run, whose rows are not there
    assert row["accuracy_verdict"] == verdict.WITHIN


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
    assert row_of(runs)["runs"] == counted
    assert row_of(runs)["accuracy"] == pytest.approx(400 / 6 / counted)
    folder.config_file.unlink()
    assert row_of(runs)["runs"] == 1


def test_one_more_run_of_a_seed_does_not_make_the_interval_narrower(runs):
    with_seed(runs, 42, RIGHT, "a")
    with_seed(runs, 43, [0.0, *RIGHT[1:]], "b")
    before = row_of(runs)
    with_seed(runs, 43, [0.0, *RIGHT[1:]], "c")
    after = row_of(runs)
    assert after["runs"] == 2
    assert after["accuracy_low"] == before["accuracy_low"]


def test_other_rows_leave_the_spread_of_runs_and_their_own_intervals(runs):
    with_seed(runs, 42, RIGHT)
    with_rows(with_seed(runs, 43, [100.0, *RIGHT[1:4], 0.0, 100.0]), RIGHT, first=1)
    row = row_of(runs)
    assert row["accuracy_interval_method"] == "rows and 2 runs"
    assert (row["accuracy_low"], row["accuracy_high"]) < (row["accuracy"] - 0.5, row["accuracy"] + 0.5)


def test_equal_scores_of_a_metric_without_rows_have_no_interval(runs):
    for seed in (42, 43):
        with_seed(runs, seed, RIGHT, loss=1.08)
    row = row_of(runs)
    assert row["perplexity"] == pytest.approx(2.945, abs=1e-3)
    assert row["perplexity_published"] == 3.0
    assert row["runs"] == 2
    assert row["perplexity_low"] is None
    assert row["perplexity_high"] is None
    assert row["perplexity_verdict"] == verdict.ACCEPTABLE  # by the tolerance, as for a single run


def test_runs_without_an_interval_have_none_together(runs):
    with_seed(runs, 42, RIGHT[:2], within=None)
    with_seed(runs, 43, RIGHT[1:3], within=None)
    assert row_of(runs)["runs"] == 2
    assert row_of(runs)["accuracy_low"] is None


def test_runs_of_one_seed_know_nothing_of_others_and_say_how_to_know_more(runs, recipe):
    with_seed(runs, 42, RIGHT, "a")
    row = row_of(runs)
    assert row["runs"] == 1
    assert row["accuracy_interval_method"] == "rows only"
    assert [row["perplexity_low"], row["perplexity_interval_method"]] == [None, None]
    assert "`recipe reproduce sums2030 --seeds 3`" in recipe("results", "sums2030").stdout
    with_seed(runs, 43, RIGHT)
    said = recipe("results", "sums2030").stdout
    assert "--seeds" not in said and "rows and 2 runs" in said


def test_a_known_spread_stands_in_and_is_marked(runs, recipe):
    published = {PLAIN: {"scores": {"accuracy": 67.4}, "repeats": {"accuracy": [67.4, 68.0, 66.9]}}, WIDE: {}}
    small_study.write(Path(), published=published, tolerances={})
    with_seed(runs, 42, RIGHT)
    small_study.ran(runs, WIDE, "a", 70.0)
    row = row_of(runs)
    method = row["accuracy_interval_method"]
    assert method == row_of(runs, WIDE)["accuracy_interval_method"] and {"0.55", "3"} < set(method.split())
    half = float(
        intervals.half_width(np.std([67.4, 68.0, 66.9], ddof=1) ** 2, (0.5 / intervals.NORMAL) ** 2, 2, intervals.MANY)
    )
    assert row["accuracy_high"] - row["accuracy"] == pytest.approx(half) and half > 0.5
    assert method in recipe("results", "sums2030").stdout
    with_seed(runs, 43, RIGHT)
    assert row_of(runs)["accuracy_interval_method"] == "rows and 2 runs"  # ours are better than any borrowed


def test_a_further_decoding_is_the_mean_of_the_runs_that_have_it(runs):
    one, other, _ = (with_seed(runs, seed, RIGHT) for seed in (42, 43, 44))
    small_study.decoded(one, 64.0)
    small_study.decoded(other, 66.0)
    assert row_of(runs)["accuracy_greedy"] == 65


def test_scores_by_another_judge_are_not_averaged(runs):
    recipe_name = "haider2024/llama-2-7b"
    folders = []
    for name, model in (("a", "roberta-large"), ("b", "other")):
        scores = {"rows": 5000, "bleu4": 5.0, "bertscore_f1": 0.8, "bertscore": {"model": model}, "intervals": {}}
        folders.append(a_run(runs, recipe_name, name, 0, scores=scores))
    found = [RunResult(folder, folder.read()) for folder in folders]
    columns = read_scores(folders[0].path).columns
    assert len(repeats.scored_runs(columns["bleu4"], found)) == 2
    assert repeats.scored_runs(columns["bertscore_f1"], found) == [(found[0], 0.8)]


def test_the_curves_gap_has_a_verdict_where_the_study_gives_a_tolerance(runs, recipe):
    with_seed(runs, 42, RIGHT)  # 2.5 and 1.4, where 2.5 and 1.5 were published
    row = row_of(runs)
    assert row["train_loss_gap_mean"] == pytest.approx(-0.05)
    assert row["train_loss_gap_largest"] == pytest.approx(0.1)
    assert row["train_loss_gap_step"] == 4
    assert row["train_loss_verdict"] is None and row_of(runs, WIDE)["train_loss_gap_mean"] is None
    assert study_tables.CURVES in recipe("results", "sums2030").stdout
    # in binary, 0.1 is less than 1.5 - 1.4
    for tolerance, expected in ((0.1, verdict.ACCEPTABLE), (0.09, verdict.OFF)):
        small_study.write(Path(), tolerances={"train_loss": tolerance})
        assert row_of(runs)["train_loss_verdict"] == expected
