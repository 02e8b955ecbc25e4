from typing import Any, NamedTuple

import numpy as np
import pytest
from interval_coverage import RATIOS, RUNS, coverage
from scipy import stats

from qlora_recipes.evaluate import intervals
from qlora_recipes.evaluate.intervals import Interval
from qlora_recipes.metrics import answers
from qlora_recipes.metrics.metric import wilson
from qlora_recipes.metrics.registry import METRICS


@pytest.fixture
def scores() -> tuple[list[float], list[float]]:
    """Two systems' scores of the same 300 rows, skewed and with ties as BLEU's are."""
    chance = np.random.default_rng(1)
    a = chance.exponential(5, 300)
    b = np.where(chance.random(300) < 0.3, a, a + chance.normal(0.4, 2, 300))
    return a.tolist(), b.tolist()


def test_a_comparison_pairs_the_rows(scores):
    a, b = scores
    comparison = intervals.paired(a, b)
    assert comparison["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert comparison["p_wilcoxon"] == pytest.approx(stats.wilcoxon(a, b).pvalue, rel=0.01)  # the normal approximation
    assert comparison["better"] == sum(x > y for x, y in zip(a, b, strict=True))
    assert comparison["equal"] == sum(x == y for x, y in zip(a, b, strict=True))
    assert comparison["worse"] == sum(x < y for x, y in zip(a, b, strict=True))


def test_equal_systems_and_few_rows_tell_nothing():
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    same = intervals.paired(scores, scores)
    assert same["difference"] == 0
    assert same["interval"] == [0, 0]
    assert same["p_wilcoxon"] == 1
    few = intervals.paired(scores[:4], [0.0] * 4)
    assert few == {
        **{"difference": 2.5, "interval": None, "p_wilcoxon": None},
        **{"better": 4, "equal": 0, "worse": 0},
    }
    for name, values in (("chrf", scores[:4]), ("number", [100.0] * 4), ("chrf", [4.0] * 20)):
        assert METRICS[name].interval(values) is None


@pytest.mark.parametrize(("right", "rows"), [(0, 12), (12, 12), (1, 12), (286, 1319)])
def test_a_share_has_wilsons_interval(right, rows):
    expected = stats.binomtest(right, rows).proportion_ci(method="wilson")
    interval = METRICS["number"].interval([100.0] * right + [0.0] * (rows - right))
    assert interval == pytest.approx([100 * expected.low, 100 * expected.high], abs=1e-4)
    assert 0 <= interval[0] < interval[1] <= 100


@pytest.mark.parametrize("rows", [5, 12, 50, 400])
def test_wilsons_interval_covers_the_truth(rows):
    within = np.array([wilson(100 * right / rows, rows) for right in range(rows + 1)]) / 100
    covered = []
    for truth in np.linspace(0.005, 0.995, 199):
        contains = (within[:, 0] <= truth) & (truth <= within[:, 1])
        covered.append(stats.binom.pmf(np.arange(rows + 1), rows, truth)[contains].sum())
    assert 0.945 <= np.mean(covered) <= 0.96


@pytest.mark.parametrize("truths", [np.linspace(0.7, 0.95, 8), np.full(8, 0.98)], ids=["apart", "near 100 %"])
def test_the_interval_of_a_mean_of_groups_covers_the_truth(truths):
    rng, covered = np.random.default_rng(7), 0
    for _ in range(STUDIES):
        groups = [(100.0 * (rng.random(20) < truth)).tolist() for truth in truths]
        _, (low, high) = answers.mean_of_groups(groups, METRICS["number"])
        covered += low <= 100 * truths.mean() <= high
    assert covered / STUDIES >= 0.93  # 89 % near 100 %, were the groups' own variances taken


def test_ties_have_an_exact_p_value():
    tied = intervals.paired([100.0] * 12 + [0.0] * 2 + [100.0] * 6, [0.0] * 12 + [100.0] * 2 + [100.0] * 6)
    assert tied["p_wilcoxon"] == pytest.approx(stats.binomtest(2, 14).pvalue)  # 0.0129; the approximation has 0.0075
    a, b = np.random.default_rng(2).normal(0.3, 1, (2, 30))
    assert intervals.paired(a, b)["p_wilcoxon"] == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue)
    signs = [1.0, 1.0, -2.0, 3.0, 3.0, 0.5, 4.0]
    permuted = stats.wilcoxon(signs, method=stats.PermutationMethod(n_resamples=1000))  # all 128
    assert intervals.paired(signs, [0.0] * 7)["p_wilcoxon"] == pytest.approx(permuted.pvalue)


class Variances(NamedTuple):
    """Variances of a score's run effects, row effects and residual."""

    of_runs: float
    of_rows: float
    rest: float


STUDIES = 1_000
SEEDS = Variances(of_runs=0.49, of_rows=1.0, rest=1.0)  # with 400 rows most of the noise is of seeds
ROWS = Variances(of_runs=0.0, of_rows=4.0, rest=0.5)
BOTH = Variances(of_runs=0.0036, of_rows=1.0, rest=0.5)


def normal(variances: Variances, runs: int, rows: int, rng: np.random.Generator) -> Any:
    """The scores of a synthetic study whose truth is 0."""
    of_runs, of_rows, rest = np.sqrt(variances)
    effects = of_runs * rng.normal(size=(runs, 1)) + of_rows * rng.normal(size=(1, rows))
    return effects + rest * rng.normal(size=(runs, rows))


def right_or_wrong(variances: Variances, runs: int, rows: int, rng: np.random.Generator) -> Any:
    """The same with 0 or 100 in each row, in one of two on average, less 50."""
    return 100.0 * (normal(variances, runs, rows, rng) > 0) - 50


@pytest.mark.parametrize("runs", RUNS)
def test_the_interval_covers_the_truth_on_the_grid_of_the_table(runs):
    assert min(coverage(runs, 400, ratio, STUDIES) for ratio in RATIOS) >= 0.945  # 95 % but for the noise of the draws


def test_the_interval_of_two_means_is_banerjees():
    half = intervals.half_width(4.0, 9.0, 1, 10)
    assert half == pytest.approx((12.7062**2 * 4 + 2.22814**2 * 9) ** 0.5, rel=1e-5)  # of a table of Student's t
    assert intervals.half_width(0.0, 9.0, 1, 10) == pytest.approx(2.22814 * 3, rel=1e-5)
    assert intervals.half_width(0.0, 0.0, 1, 10) == 0


@pytest.mark.parametrize("runs", [2, 5])
@pytest.mark.parametrize("variances", [SEEDS, ROWS, BOTH], ids=["seeds", "rows", "both"])
@pytest.mark.parametrize("scored", [normal, right_or_wrong])
def test_the_interval_of_a_table_of_scores_covers_the_truth(scored, variances, runs):
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(STUDIES):
        table = scored(variances, runs, 400, rng)
        within = intervals.interval_of_mean(table.mean(axis=1), table)
        assert within
        covered += within.low <= 0 <= within.high
    assert covered / STUDIES >= 0.93


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_the_interval_covers_a_share_near_its_end(runs):
    rng = np.random.default_rng(4)
    truth = 100 * stats.norm.cdf(2.2 / 1.54**0.5)
    of_counts = [METRICS["number"].interval([100.0] * right + [0.0] * (12 - right)) for right in range(13)]
    covered = 0
    for _ in range(STUDIES):
        table = 100.0 * (normal(Variances(of_runs=0.04, of_rows=1.0, rest=0.5), runs, 12, rng) > -2.2)
        over_rows = [of_counts[right] for right in (table > 0).sum(axis=1)]
        within = intervals.interval_of_mean(table.mean(axis=1), table, over_rows)
        assert within and within.low < within.high
        covered += within.low <= truth <= within.high
    assert covered / STUDIES >= 0.93  # 49 % with two runs, if rows that are all right had no spread


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("variances", [SEEDS, ROWS, BOTH], ids=["seeds", "rows", "both"])
def test_without_row_scores_the_interval_covers_the_truth_and_is_not_narrower_than_one_run_s(variances, runs):
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(STUDIES):
        table = normal(variances, runs, 400, rng)
        means, halves = table.mean(axis=1), 1.96 * table.std(axis=1) / 20
        over_rows = list(zip(means - halves, means + halves, strict=True))
        within = intervals.interval_of_mean(means, None, over_rows)
        assert within and within.high - within.low >= 2 * max(halves)
        covered += within.low <= 0 <= within.high
    assert covered / STUDIES >= 0.93  # 82 % with two runs and noise of rows, were only the runs' spread counted


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_one_run_with_published_repeats_covers_the_truth(repeats):
    rng = np.random.default_rng(5)
    covered = alone = 0
    for _ in range(STUDIES):
        run, *other_runs = normal(Variances(of_runs=0.04, of_rows=1.0, rest=0.01), repeats + 1, 400, rng)
        half = 1.96 * run.std() / 400**0.5
        of_rows = [run.mean() - half, run.mean() + half]
        means = [other.mean() for other in other_runs]
        published, rows = (intervals.interval_of_mean([run.mean()], None, [of_rows], of) for of in (means, ()))
        assert published and rows and rows.method == "rows only"
        covered += published.low <= 0 <= published.high
        alone += rows.low <= 0 <= rows.high
    assert covered / STUDIES >= 0.94
    assert alone / STUDIES < 0.75  # which is why a verdict says that it knows rows only


def test_the_mean_squares_are_those_of_a_two_way_layout():
    table = np.random.default_rng(0).normal(size=(4, 30))
    squares = intervals.mean_squares(table)
    assert squares.of_runs == pytest.approx(30 * np.var(table.mean(axis=1), ddof=1))
    assert squares.of_rows == pytest.approx(4 * np.var(table.mean(axis=0), ddof=1))
    total = 3 * squares.of_runs + 29 * squares.of_rows + 87 * squares.rest
    assert total == pytest.approx(120 * np.var(table))


@pytest.mark.parametrize(
    ("interval", "words", "covers_seeds"),
    [
        pytest.param(Interval(0, 1), "rows only", False, id="rows"),
        pytest.param(Interval(0, 1, runs=2), "rows and 2 runs (Banerjee)", True, id="runs"),
        pytest.param(
            Interval(0, 1, runs=2, one_seed=True), "rows and 2 runs of one seed (Banerjee)", False, id="one seed"
        ),
        pytest.param(
            Interval(0, 1, repeats=(48.0, 48.2, 49.14)),
            "rows and a run-to-run standard deviation of 0.61 from 3 published repeats, 48 to 49.14 (Banerjee)",
            False,
            id="published",
        ),
    ],
)
def test_an_interval_says_which_variation_it_covers(interval, words, covers_seeds):
    assert interval.method == words
    assert interval.covers_seeds is covers_seeds


def test_an_interval_covers_rows_runs_or_published_repeats():
    rows = [[1.0, 2.0, 3.0], [1.5, 2.0, 3.5]]
    two = intervals.interval_of_mean([2.0, 2.33], rows)
    assert two.method == "rows and 2 runs (Banerjee)"
    repeats = [47.84, 48.22, 49.05]
    for scores in ([5.0], [5.0, 5.0], [5.0, 5.3, 5.1]):
        assert intervals.interval_of_mean(scores, None) is intervals.interval_of_mean(scores, None, (), repeats) is None
    equal = intervals.interval_of_mean([5.0, 5.0], None, [[4.5, 5.6], [4.75, 5.5]])
    assert [equal.low, equal.high] == pytest.approx([4.5, 5.6])
    assert equal.method == "rows and 2 runs (Banerjee)"
    alone = intervals.interval_of_mean([5.0], None, [[4.5, 5.6]])
    assert [alone.low, alone.high] == pytest.approx([4.5, 5.6])
    assert alone.method == "rows only"
    published = intervals.interval_of_mean([48.0], None, [[45.0, 50.0]], repeats)
    assert published.over_rows
    assert published.repeats == tuple(repeats)
    assert published.low < 45
    assert published.high > 50
    assert 48 - published.low > published.high - 48  # the rows' own skew


def test_runs_that_are_alike_to_the_last_row_are_as_certain_as_their_rows():
    rows = np.random.default_rng(0).normal(size=100)
    within = intervals.interval_of_mean([rows.mean()] * 3, [rows] * 3)
    low, high = stats.t.interval(0.95, 99, rows.mean(), stats.sem(rows))
    assert [within.low, within.high] == pytest.approx([low, high])
    assert intervals.interval_of_mean([4.0, 4.0], [[4.0, 4.0], [4.0, 4.0]]) is None


def test_runs_that_err_in_other_rows_have_an_interval():
    rows = [[100.0] * 11 + [0.0], [0.0] + [100.0] * 11]
    within = [METRICS["number"].interval(of_run) for of_run in rows]
    two = intervals.interval_of_mean([1100 / 12] * 2, rows, within)  # both variances of the layout are 0
    assert [two.low, two.high] == pytest.approx(within[0], abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 100.0])
def test_runs_that_are_always_right_or_wrong_have_no_narrower_interval_than_one(share):
    rows = [share] * 12
    one = METRICS["number"].interval(rows)
    two = intervals.interval_of_mean([share] * 2, [rows] * 2, [one] * 2)
    assert [two.low, two.high] == pytest.approx(one, abs=1e-3) and two.high - two.low > 24


def test_runs_on_the_same_rows_vary_by_students_t():
    assert intervals.interval_on_fixed_rows([0.38]) is None
    assert intervals.interval_on_fixed_rows([0.802], [0.802, 0.802]) is None
    published = intervals.interval_on_fixed_rows([0.38], [0.3797, 0.3796, 0.3796])
    assert published is not None
    repeated = "a run-to-run standard deviation of 5.8e-05 from 3 published repeats, 0.3796 to 0.3797"
    assert published.method == f"{repeated} (Student's t)"
    assert published.high - 0.38 == pytest.approx(4.302653 * 5.7735e-5, rel=1e-5)  # of two degrees of freedom
    measured = intervals.interval_on_fixed_rows([0.38, 0.382], [0.3797, 0.3796, 0.3796])
    assert measured is not None and (measured.method, measured.covers_seeds) == ("2 runs (Student's t)", True)
    assert measured.high - 0.381 == pytest.approx(12.7062 * 0.0014142 / 2**0.5, rel=1e-4)
