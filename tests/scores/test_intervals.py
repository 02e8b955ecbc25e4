from typing import Any

import numpy as np
import pytest
from scipy import stats

from qlora_recipes.scores import intervals
from qlora_recipes.scores.intervals import Variances


@pytest.fixture
def scores() -> tuple[list[float], list[float]]:
    """Two systems' scores of the same 300 rows, skewed and with ties as BLEU's are."""
    chance = np.random.default_rng(1)
    a = chance.exponential(5, 300)
    b = np.where(chance.random(300) < 0.3, a, a + chance.normal(0.4, 2, 300))
    return a.tolist(), b.tolist()


def test_a_comparison_pairs_the_rows(scores):
    a, b = scores
    found = intervals.paired(a, b)
    assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert found["p_wilcoxon"] == stats.wilcoxon(a, b).pvalue
    assert (found["better"], found["equal"], found["worse"]) == (
        sum(x > y for x, y in zip(a, b, strict=True)),
        sum(x == y for x, y in zip(a, b, strict=True)),
        sum(x < y for x, y in zip(a, b, strict=True)),
    )


def test_a_bootstraps_p_is_never_zero():
    assert intervals.paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])["p_bootstrap"] == 2 / (intervals.RESAMPLES + 1)


def test_equal_systems_and_few_rows_tell_nothing():
    same = intervals.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same["difference"], same["p_bootstrap"], same["p_wilcoxon"]) == (0, 1, 1)
    assert intervals.each({"a": [4.0, 1.0, 2.0, 3.0]}) == {"a": None}
    assert intervals.each({}) == {}
    assert intervals.paired([4.0], [1.0])["interval"] is None


STUDIES = 1_000
SEEDS = Variances(of_runs=0.49, of_rows=1.0, rest=1.0)  # with 400 rows most of the noise is of seeds
ROWS = Variances(of_runs=0.0, of_rows=4.0, rest=0.5)
BOTH = Variances(of_runs=0.0036, of_rows=1.0, rest=0.5)


def normal(variances: Variances, runs: int, rows: int, rng: np.random.Generator) -> Any:
    """The scores of a synthetic study whose truth is 0."""
    of_runs, of_rows, rest = np.sqrt([variances.of_runs, variances.of_rows, variances.rest])
    effects = of_runs * rng.normal(size=(runs, 1)) + of_rows * rng.normal(size=(1, rows))
    return effects + rest * rng.normal(size=(runs, rows))


def right_or_wrong(variances: Variances, runs: int, rows: int, rng: np.random.Generator) -> Any:
    """The same with 0 or 100 in each row, in one of two on average, less 50."""
    return 100.0 * (normal(variances, runs, rows, rng) > 0) - 50


@pytest.mark.parametrize("runs", [2, 3, 5, 10])
@pytest.mark.parametrize("variances", [SEEDS, ROWS, BOTH], ids=["seeds", "rows", "both"])
@pytest.mark.parametrize("scored", [normal, right_or_wrong])
def test_the_interval_covers_the_truth(scored, variances, runs):
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(STUDIES):
        table = scored(variances, runs, 400, rng)
        within = intervals.of_runs(table.mean(axis=1), table)
        assert within
        covered += within.low <= 0 <= within.high
    assert 0.93 <= covered / STUDIES <= 0.97


@pytest.mark.parametrize("variances", [SEEDS, ROWS, BOTH], ids=["seeds", "rows", "both"])
@pytest.mark.parametrize("runs", [2, 3, 5, 10])
def test_predicted_power_is_that_of_simulated_studies(variances, runs):
    rng = np.random.default_rng(3)
    planned = intervals.power(variances, runs, 200)
    differences = [planned.smallest(0.3), planned.smallest()]
    seen = np.zeros(2)
    for _ in range(STUDIES):
        table = normal(variances, runs, 200, rng)
        within = intervals.of_runs(table.mean(axis=1), table)
        assert within
        seen += [not within.low <= difference <= within.high for difference in differences]
    predicted = [planned.sees(difference) for difference in differences]
    assert predicted == pytest.approx([0.3, 0.8], abs=1e-3)
    assert np.abs(seen / STUDIES - predicted).max() <= 0.05


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_one_run_with_a_borrowed_spread_covers_the_truth(repeats):
    rng = np.random.default_rng(5)
    covered = alone = 0
    for _ in range(STUDIES):
        own, *others = normal(Variances(of_runs=0.04, of_rows=1.0, rest=0.01), repeats + 1, 400, rng)
        half = 1.96 * own.std() / 400**0.5
        of_rows = [own.mean() - half, own.mean() + half]
        borrowed, rows = (intervals.of_runs([own.mean()], None, of_rows, of) for of in ([o.mean() for o in others], ()))
        assert borrowed and rows and rows.method == "rows only"
        covered += borrowed.low <= 0 <= borrowed.high
        alone += rows.low <= 0 <= rows.high
    assert 0.93 <= covered / STUDIES <= 0.97
    assert alone / STUDIES < 0.75  # which is why a verdict says that it knows rows only


def test_the_mean_squares_are_those_of_a_two_way_layout():
    table = np.random.default_rng(0).normal(size=(4, 30))
    squares = intervals.mean_squares(table)
    assert squares.of_runs == pytest.approx(30 * np.var(table.mean(axis=1), ddof=1))
    assert squares.of_rows == pytest.approx(4 * np.var(table.mean(axis=0), ddof=1))
    total = 3 * squares.of_runs + 29 * squares.of_rows + 87 * squares.rest
    assert total == pytest.approx(120 * np.var(table))
    found = intervals.estimated([squares, squares])
    assert found == intervals.estimated([squares])
    assert found.rest == pytest.approx(squares.rest)
    assert found.of_rows == pytest.approx(max((squares.of_rows - squares.rest) / 4, 0))


def test_what_an_interval_knows():
    rows = [[1.0, 2.0, 3.0], [1.5, 2.0, 3.5]]
    assert intervals.of_runs([2.0, 2.33], rows).method == "rows and 2 runs"
    few = intervals.of_runs([5.0, 5.3, 5.1], None)
    expected = stats.t.interval(0.95, 2, loc=np.mean([5.0, 5.3, 5.1]), scale=stats.sem([5.0, 5.3, 5.1]))
    assert [few.low, few.high] == pytest.approx([*expected]) and few.method == "3 runs only"
    assert intervals.of_runs([5.0], None, [4.5, 5.6]) == intervals.Interval(4.5, 5.6, "rows only")
    assert intervals.of_runs([5.0], None) is None
    repeats = [47.84, 48.22, 49.05]
    borrowed = intervals.of_runs([48.0], None, [45.0, 50.0], repeats)
    assert borrowed.method.startswith("rows, ") and "0.62 from 3 repeats" in borrowed.method
    assert borrowed.low < 45 and borrowed.high > 50 and 48 - borrowed.low > borrowed.high - 48  # the rows' own skew
    alone = intervals.of_runs([48.0], None, None, repeats)
    half = stats.t.ppf(0.975, 2) * np.std(repeats, ddof=1)
    assert [alone.low, alone.high] == pytest.approx([48 - half, 48 + half])
    assert "rows" not in alone.method and "0.62 from 3 repeats" in alone.method


def test_runs_that_are_alike_to_the_last_row_are_as_certain_as_their_rows():
    rows = np.random.default_rng(0).normal(size=100)
    within = intervals.of_runs([rows.mean()] * 3, [rows] * 3)
    low, high = stats.t.interval(0.95, 99, rows.mean(), stats.sem(rows))
    assert [within.low, within.high] == pytest.approx([low, high])
    same = intervals.of_runs([4.0, 4.0], [[4.0, 4.0], [4.0, 4.0]])
    assert (same.low, same.high) == (4, 4)
