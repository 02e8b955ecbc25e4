"""A study's scores are means over the runs that repeat one another, with an interval that says what it knows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_study
from conftest import Recipe
from run_folders import a_run
from small_study import PLAIN, WIDE

from qlora_recipes.base.files import write_rows
from qlora_recipes.configs.config import Difference
from qlora_recipes.results import repeats, study_tables, verdict
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import noise
from qlora_recipes.scores.evaluations import read_scores

RIGHT = [100.0, 0.0, 100.0, 0.0, 100.0, 100.0]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for runs in a folder of work with the small study."""
    small_study.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def row_of(runs: Path, recipe: str = PLAIN) -> dict[str, Any]:
    (found,) = [row for row in verdict.rows(small_study.read(), runs, False) if row["recipe"] == recipe]
    return found


TEXTS = {"reference": "1", "prediction": "1"}


def with_seed(runs: Path, seed: int, right: list[float], name: str = "", **more: Any) -> RunDir:
    """A run of a seed with the scores of its rows; 42 is the recipe's own."""
    changed = more.pop("set", {})
    accuracy = sum(right) / len(right)
    changed |= {"seed": seed} if seed != 42 else {}
    folder = small_study.ran(runs, PLAIN, name or f"2026-{seed}", accuracy, set=changed, **more)
    write_rows(
        folder.path / "predictions.jsonl", [{"row": i, "accuracy": value} | TEXTS for i, value in enumerate(right)]
    )
    return folder


def test_runs_of_other_seeds_count_as_one(runs: Path) -> None:
    own = with_seed(runs, 42, RIGHT)
    with_seed(runs, 43, [100.0, 0.0, 100.0, 100.0, 100.0, 100.0])
    with_seed(runs, 44, [100.0, 0.0, 0.0, 0.0, 100.0, 100.0])
    row = row_of(runs)
    assert (row["run"], row["runs"]) == (str(own.path), 3)  # that of the recipe's seed speaks
    assert row["accuracy"] == pytest.approx(100 * 12 / 18)
    assert row["accuracy_difference"] == pytest.approx(100 * 12 / 18 - 67.4)
    assert row["accuracy_interval_method"] == "rows and 3 runs"
    table = np.array([RIGHT, [100, 0, 100, 100, 100, 100], [100, 0, 0, 0, 100, 100]])
    half = noise.mean_squares(table).half_width()
    assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((table.mean() - half, table.mean() + half))
    assert (row["chrf"], row["chrf_interval_method"]) == (20.5, "3 runs only")  # whose rows are not there
    assert row["verdict"] == verdict.WITHIN


@pytest.mark.parametrize(
    "other",
    [
        {"set": {"lora_r": 64}},
        {"set": {"micro_batch_size": True}},  # not the 1 of the recipe
        {"gpus_used": 2},
        {"state": "interrupted"},
        {"axolotl_arguments": ["--debug"]},
        {"settings": {"data_sha256": "y"}},
        {"settings": {"rows": 100, "limit": 100}},
        {"decoding": small_study.GREEDY},
        {"rehearsal": True},
    ],
)
def test_a_run_that_differs_in_more_is_no_repeat(runs: Path, other: dict[str, Any]) -> None:
    with_seed(runs, 42, RIGHT)
    with_seed(runs, 43, [0.0] * 6, **other)
    assert (row_of(runs)["runs"], row_of(runs)["accuracy"]) == (1, pytest.approx(400 / 6))


def test_output_places_and_trackers_make_no_difference(runs: Path) -> None:
    with_seed(runs, 42, RIGHT, set={"output_dir": "one", "dataset_prepared_path": "a"})
    with_seed(runs, 43, RIGHT, set={"output_dir": "other", "wandb_project": "p", "use_mlflow": True})
    assert row_of(runs)["runs"] == 2


def test_a_run_whose_config_is_gone_is_no_repeat(runs: Path) -> None:
    with_seed(runs, 42, RIGHT)
    with_seed(runs, 43, RIGHT).config.unlink()
    assert row_of(runs)["runs"] == 1


def test_the_same_seed_again_is_told(runs: Path, recipe: Recipe) -> None:
    with_seed(runs, 42, RIGHT, "a")
    with_seed(runs, 42, RIGHT, "b")
    assert "one seed" in row_of(runs)["accuracy_interval_method"]
    assert "`recipe reproduce sums2030 --seeds 3`" in recipe("results", "--study", "sums2030").stdout


def test_one_more_run_of_a_seed_does_not_make_the_interval_narrower(runs: Path) -> None:
    with_seed(runs, 42, RIGHT, "a")
    with_seed(runs, 43, [0.0, *RIGHT[1:]], "b")
    before = row_of(runs)
    with_seed(runs, 43, [0.0, *RIGHT[1:]], "c")
    after = row_of(runs)
    assert (after["runs"], after["accuracy_low"]) == (2, before["accuracy_low"])


def test_other_rows_leave_the_spread_of_runs(runs: Path) -> None:
    with_seed(runs, 42, RIGHT)
    folder = with_seed(runs, 43, [0.0, *RIGHT[1:]])
    rows = [{"row": i + 1, "accuracy": value} | TEXTS for i, value in enumerate(RIGHT)]
    write_rows(folder.path / "predictions.jsonl", rows)
    assert row_of(runs)["accuracy_interval_method"] == "2 runs only"


def test_one_run_knows_rows_only_and_says_how_to_know_more(runs: Path, recipe: Recipe) -> None:
    with_seed(runs, 42, RIGHT)
    row = row_of(runs)
    assert (row["runs"], row["accuracy_interval_method"]) == (1, noise.ROWS_ONLY)
    assert [row["perplexity_low"], row["perplexity_interval_method"]] == [None, None]
    said = recipe("results", "--study", "sums2030").stdout
    assert "`recipe reproduce sums2030 --seeds 3`" in said
    with_seed(runs, 43, RIGHT)
    said = recipe("results", "--study", "sums2030").stdout
    assert "--seeds" not in said and "sums2030/plain." in said


def test_a_known_spread_stands_in_and_is_marked(runs: Path, tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "recipes" / "sums2030").rename(tmp_path / "before")
    published = {PLAIN: {"scores": {"accuracy": 67.4}, "repeats": {"accuracy": [67.4, 68.0, 66.9]}}, WIDE: {}}
    small_study.write(tmp_path, published=published, tolerances={})
    with_seed(runs, 42, RIGHT)
    small_study.ran(runs, WIDE, "a", 70.0)
    row = row_of(runs)
    method = row["accuracy_interval_method"]
    assert method == row_of(runs, WIDE)["accuracy_interval_method"] and {"0.55", "3"} < set(method.split())
    half = float(noise.half_width(np.std([67.4, 68.0, 66.9], ddof=1) ** 2, (0.5 / noise.NORMAL) ** 2, 2, noise.MANY))
    assert row["accuracy_high"] - row["accuracy"] == pytest.approx(half) and half > 0.5
    said = recipe("results", "--study", "sums2030").stdout
    assert method in said
    with_seed(runs, 43, RIGHT)
    assert row_of(runs)["accuracy_interval_method"] == "rows and 2 runs"  # ours are better than any borrowed


def test_a_further_decoding_is_the_mean_of_the_runs_that_have_it(runs: Path) -> None:
    one, other, _ = (with_seed(runs, seed, RIGHT) for seed in (42, 43, 44))
    small_study.decoded(one, 64.0)
    small_study.decoded(other, 66.0)
    assert row_of(runs)["accuracy_greedy"] == 65


def test_scores_by_another_judge_are_not_averaged(runs: Path) -> None:
    recipe = "haider2024/llama-2-7b"
    folders = []
    for name, model in (("a", "roberta-large"), ("b", "other")):
        scores = {"rows": 5000, "bleu4": 5.0, "bertscore_f1": 0.8, "bertscore": {"model": model}, "intervals": {}}
        folders.append(a_run(runs, recipe, name, 0, scores=scores))
    found = [(folder, folder.read()) for folder in folders]
    columns = read_scores(folders[0].path).columns
    assert len(repeats.scores(columns["bleu4"], found)) == 2
    assert [*repeats.scores(columns["bertscore_f1"], found)] == folders[:1]


def test_the_curves_gap_has_a_verdict_where_the_study_gives_a_tolerance(
    runs: Path, tmp_path: Path, recipe: Recipe
) -> None:
    with_seed(runs, 42, RIGHT)  # 2.5 and 1.4, where 2.5 and 1.5 were published
    row = row_of(runs)
    assert row["train_loss_gap_mean"] == pytest.approx(-0.05)
    assert (row["train_loss_gap_largest"], row["train_loss_gap_step"]) == (pytest.approx(0.1), 4)
    assert row["train_loss_verdict"] is None and row_of(runs, WIDE)["train_loss_gap_mean"] is None
    assert study_tables.CURVES in recipe("results", "--study", "sums2030").stdout
    for tolerance, expected in ((0.11, verdict.ACCEPTABLE), (0.09, verdict.OFF)):
        (tmp_path / "recipes" / "sums2030").rename(tmp_path / f"before {tolerance}")
        small_study.write(tmp_path, tolerances={"train_loss": tolerance})
        assert row_of(runs)["train_loss_verdict"] == expected
    said = recipe("results", "--study", "sums2030").stdout.splitlines()
    assert [line for line in said if PLAIN in line and verdict.OFF in line and "train_loss" not in line]


def test_the_recipes_own_seed_speaks_even_if_it_is_older(runs: Path) -> None:
    own = with_seed(runs, 42, RIGHT, "1")
    newer = with_seed(runs, 43, RIGHT, "2")
    run = own.read()
    run.overrides, run.differences = ["seed=42"], []  # as `reproduce --seeds` asks for it
    own.write(run)
    run = newer.read()
    run.differences = [Difference(key="seed", recipe=42, run=43, why="--set seed")]
    newer.write(run)
    assert row_of(runs)["run"] == str(own.path)
    assert row_of(runs)["differs"] == []
