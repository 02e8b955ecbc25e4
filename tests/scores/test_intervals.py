import numpy as np
import pytest
import scipy.stats

from qlora_recipes.scores import intervals


@pytest.fixture
def scores() -> tuple[list[float], list[float]]:
    """Two systems' scores of the same 300 rows, skewed and with ties as BLEU's are."""
    chance = np.random.default_rng(1)
    a = chance.exponential(5, 300)
    b = np.where(chance.random(300) < 0.3, a, a + chance.normal(0.4, 2, 300))
    return a.tolist(), b.tolist()


def test_an_interval_is_scipys(scores: tuple[list[float], list[float]]) -> None:
    expected = scipy.stats.bootstrap(
        (scores[0],), np.mean, n_resamples=intervals.RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert intervals.interval(scores[0]) == [expected.low, expected.high]
    assert intervals.each({"a": scores[0], "b": scores[1]}) == {
        "a": [expected.low, expected.high],
        "b": intervals.interval(scores[1]),
    }


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    chance = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        found = intervals.interval(chance.normal(3, 1, 60).tolist())
        assert found
        hits += found[0] <= 3 <= found[1]
    assert 0.90 <= hits / 200 <= 0.985


def test_a_comparison_is_scipys(scores: tuple[list[float], list[float]]) -> None:
    a, b = scores
    found = intervals.paired(a, b)
    assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b))
    assert found["p_wilcoxon"] == scipy.stats.wilcoxon(a, b).pvalue
    expected = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        paired=True,
        n_resamples=intervals.RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found["interval"] == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert (found["better"], found["equal"], found["worse"]) == (
        sum(x > y for x, y in zip(a, b, strict=True)),
        sum(x == y for x, y in zip(a, b, strict=True)),
        sum(x < y for x, y in zip(a, b, strict=True)),
    )


def test_both_ways_differ_alike(scores: tuple[list[float], list[float]]) -> None:
    a, b = scores
    one, other = intervals.paired(a, b), intervals.paired(b, a)
    assert one["difference"] == -other["difference"]
    assert one["p_bootstrap"] == pytest.approx(other["p_bootstrap"], abs=1e-9)
    assert one["p_wilcoxon"] == pytest.approx(other["p_wilcoxon"])


def test_a_bootstraps_p_is_never_zero() -> None:
    assert intervals.paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])["p_bootstrap"] == 2 / (intervals.RESAMPLES + 1)


def test_equal_systems_and_single_rows_tell_nothing() -> None:
    same = intervals.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same["difference"], same["p_bootstrap"], same["p_wilcoxon"]) == (0, 1, 1)
    assert intervals.interval([4.0]) is None
    assert intervals.each({"a": [4.0]}) == {"a": None}
    assert intervals.each({}) == {}
    assert intervals.paired([4.0], [1.0])["interval"] is None
