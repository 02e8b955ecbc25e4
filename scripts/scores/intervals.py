"""Intervals of scores over rows and over runs, tests of differences, and the power of a study of several runs.

The bootstrap is scipy's to the last digit, which is not called for it: importing it takes longer than all else.

A run's score is a mean over test rows, and differs for two reasons: other rows would have been easier or harder, and
another seed would have given another model. With S runs scored on the same n rows, row j of run i is taken as
mean + a_i + b_j + e_ij: a two-way layout with random effects, one value in each cell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import numpy as np

RESAMPLES = 9_999
FEWEST = 5  # rows with an interval: a bootstrap of fewer has too few different resamples


def _resampled(*columns: np.ndarray) -> list[np.ndarray]:
    """Means of resamples of columns; each resample has the same rows of all columns."""
    rng = np.random.default_rng(0)
    rows, batch = len(columns[0]), 20  # which stays in the processor's cache
    means = []
    for done in range(0, RESAMPLES, batch):
        drawn = rng.integers(0, rows, (min(batch, RESAMPLES - done), rows))
        means.append([column[drawn].mean(axis=1) for column in columns])
    return [np.concatenate(of_column) for of_column in zip(*means, strict=True)]


def _within(means: np.ndarray) -> list[float]:
    """Bounds of the middle 95 % of means, to the last digit those of scipy, unlike numpy's percentiles."""
    ordered, outside = np.sort(means), (1 - 0.95) / 2
    shares = np.array([outside, 1 - outside])
    places, parts = np.divmod(shares * len(means) + 1 - shares, 1)
    above = places.astype(int)
    return ((1 - parts) * ordered[above - 1] + parts * ordered[above]).tolist()


def each(columns: Mapping[str, Sequence[float]]) -> dict[str, list[float] | None]:
    """95 % bootstrap intervals (percentiles) of means of scores of the same rows; None for fewer than `FEWEST` rows."""
    values = [np.asarray(column, dtype=float) for column in columns.values()]
    if not values or len(values[0]) < FEWEST:
        return dict.fromkeys(columns)
    return dict(zip(columns, map(_within, _resampled(*values)), strict=True))


def of_few(values: Sequence[float]) -> list[float]:
    """Student's 95 % interval of the mean of a few values, for which a bootstrap's is too narrow; of two or more."""
    from scipy.special import stdtrit

    mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
    half = stdtrit(len(values) - 1, 0.975) * error
    return [float(mean - half), float(mean + half)]


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Difference of two systems on the same rows.

    Returns:
        The mean of a - b and its 95 % bootstrap interval; `p_bootstrap`, twice (k + 1) / (B + 1), where k of B
        resamples are on the rarer side of no difference; `p_wilcoxon` of the two-sided signed-rank test, without equal
        rows; and the numbers of rows where a is better, equal and worse.
    """
    from scipy.stats import wilcoxon

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    low_high = p_bootstrap = None
    if len(difference) > 1:
        (means,) = _resampled(difference)
        low_high = _within(means)
        fewest = min(int(np.sum(means <= 0)), int(np.sum(means >= 0)))
        p_bootstrap = min(1.0, 2 * (fewest + 1) / (RESAMPLES + 1))
    return {
        "difference": float(difference.mean()),
        "interval": low_high,
        "p_bootstrap": p_bootstrap,
        "p_wilcoxon": float(wilcoxon(difference).pvalue) if difference.any() else 1.0,
        "better": int((difference > 0).sum()),
        "equal": int((difference == 0).sum()),
        "worse": int((difference < 0).sum()),
    }


NORMAL = 1.959964  # between the 2.5 % and the 97.5 % of a normal distribution lie twice as many standard deviations
DRAWS = 20_000
ROWS_ONLY = "rows only"
BORROWED = "a borrowed spread"
MANY = 1e6  # degrees of freedom: as good as known


@dataclass(frozen=True)
class Interval:
    """95 % interval of a mean score; its method: rows, runs, or a borrowed spread."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares of a layout of runs and rows: between runs, between rows, and the residual."""

    of_runs: Any
    of_rows: Any
    rest: Any
    runs: int
    rows: int

    def half_width(self) -> Any:
        """Half the length of the 95 % interval of the mean over runs and rows, see `half_width`."""
        size = self.runs * self.rows
        own = np.maximum(self.of_rows - self.rest, 0) / size  # where rows seem to differ by less than nothing
        return half_width(self.of_runs / size, own, self.runs - 1, self.rows - 1)


def half_width(of_runs: Any, of_rows: Any, df_runs: float, df_rows: float) -> Any:
    """Half the length of the 95 % interval of a mean whose variance has a part for runs and a part for rows.

    With u as the runs' share of the estimated variance, the critical value lies between Student's for the degrees of
    freedom of rows and that for the f of runs, at (1 - (1 - u)^(1 + 2.5 / f))³ of the way.

    That was fitted to its coverage, with known noise of rows and the noise of runs 0.01 to 1,000 times that:
    93.5 to 96.4 % with two runs, 94.8 to 95.8 % with 3, 5 and 10. Satterthwaite's degrees of freedom, which are usual
    here, cover 87 % with two runs whose seeds matter most, since two runs are often alike by chance. Rows that are far
    from normal, such as a mean of 400 log-normal ones, take two points off, as of any interval. And no method makes two
    runs tell much: theirs is wide.

    Args:
        of_runs: the estimated variance of the mean by runs.
        of_rows: that by rows.
        df_runs: the degrees of freedom of the first.
        df_rows: those of the second.
    """
    from scipy.special import stdtrit

    total = np.asarray(of_runs + of_rows, dtype=float)
    share = np.divide(of_runs, total, out=np.zeros_like(total), where=total > 0)
    way = (1 - (1 - share) ** (1 + 2.5 / df_runs)) ** 3
    by_rows, by_runs = (float(stdtrit(df, 0.975)) for df in (df_rows, df_runs))
    return (by_rows + (by_runs - by_rows) * way) * np.sqrt(total)


def mean_squares(scores: Sequence[Sequence[float]]) -> MeanSquares:
    """The mean squares of the scores of each run on each row, of two or more of both."""
    table = np.asarray(scores, dtype=float)
    runs, rows = table.shape
    by_run, by_row, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    rest = table - by_run[:, None] - by_row[None, :] + mean
    return MeanSquares(
        of_runs=rows * ((by_run - mean) ** 2).sum() / (runs - 1),
        of_rows=runs * ((by_row - mean) ** 2).sum() / (rows - 1),
        rest=(rest**2).sum() / ((runs - 1) * (rows - 1)),
        runs=runs,
        rows=rows,
    )


def of_runs(
    scores: Sequence[float],
    by_row: Sequence[Sequence[float]] | None,
    of_rows: Sequence[float] | None = None,
    repeats: Sequence[float] = (),
) -> Interval | None:
    """95 % interval of the mean score of repeats of one run; None of a single one without row scores and repeats.

    Of a single run it is the interval over its rows. A published spread between runs then stands in for that of ours.
    That counts twice the changes of a rerun in single rows, which are in the rows of the run as well.

    Args:
        scores: each run's.
        by_row: the scores of each run's rows, in the same order; None where rows have none, or are not the same.
        of_rows: the interval over the rows of the run, where it is only one.
        repeats: published scores of repeats of such a run; none, or two or more.
    """
    mean = sum(scores) / len(scores)
    if len(scores) > 1:
        if by_row is not None and len(by_row[0]) > 1:
            half = float(mean_squares(by_row).half_width())
            return Interval(mean - half, mean + half, f"rows and {len(scores)} runs")
        least, most = of_few(scores)
        return Interval(least, most, f"{len(scores)} runs only")
    low, high = of_rows or (mean, mean)
    if not repeats:
        return Interval(low, high, ROWS_ONLY) if of_rows else None
    spread = stdev(repeats)
    below, above = (
        float(half_width(spread**2, (side / NORMAL) ** 2, len(repeats) - 1, MANY)) for side in (mean - low, high - mean)
    )
    borrowed = f"{BORROWED} of {spread:.2g} from {len(repeats)} repeats"
    return Interval(mean - below, mean + above, f"rows, and {borrowed}" if of_rows else borrowed)


@dataclass(frozen=True)
class Variances:
    """Variances of the effects of runs and of rows on a score, and of the residual."""

    of_runs: float
    of_rows: float
    rest: float

    def deviation(self, runs: int, rows: int) -> float:
        """The standard deviation of the mean over so many runs and rows."""
        return (self.of_runs / runs + self.of_rows / rows + self.rest / (runs * rows)) ** 0.5


def estimated(layouts: Sequence[MeanSquares]) -> Variances:
    """The variances in layouts with equally many rows, pooled by degrees of freedom."""
    rows = layouts[0].rows
    rest = _pooled([(layout.rest, (layout.runs - 1) * (rows - 1)) for layout in layouts])
    return Variances(
        of_runs=max(_pooled([(layout.of_runs, layout.runs - 1) for layout in layouts]) - rest, 0) / rows,
        of_rows=max(_pooled([((layout.of_rows - layout.rest) / layout.runs, rows - 1) for layout in layouts]), 0),
        rest=rest,
    )


def _pooled(parts: Sequence[tuple[float, int]]) -> float:
    return float(sum(value * df for value, df in parts) / sum(df for _, df in parts))


@dataclass(frozen=True)
class Power:
    """Power to see that a score differs from a value: its interval excludes the value.

    Attributes:
        halves: possible half lengths of the interval.
        deviation: standard deviation of our mean.
    """

    halves: Any
    deviation: float

    def sees(self, difference: float) -> float:
        """Chance that the interval excludes a value at a distance from the truth; at 0, of a false alarm."""
        from scipy.special import ndtr

        below = ndtr((-self.halves - difference) / self.deviation)
        return float((below + ndtr((difference - self.halves) / self.deviation)).mean())

    def smallest(self, chance: float = 0.8) -> float:
        """Smallest distance that is seen with a chance."""
        low, high = 0.0, 1.0
        while self.sees(high) < chance:
            high *= 2
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.sees(middle) >= chance else (middle, high)
        return high


def power(variances: Variances, runs: int, rows: int, repeats: Sequence[float] = ()) -> Power:
    """The power of the intervals that `of_runs` gives, if scores vary so and are about normal.

    The mean squares of several runs are drawn from their distributions, so that the length of the interval is as
    uncertain as it will be. Of one run the interval over rows counts as known, and with `repeats` has their spread.
    """
    deviation = variances.deviation(runs, rows)
    if runs == 1:
        own = (variances.of_rows + variances.rest) / rows
        borrowed = stdev(repeats) ** 2 if repeats else 0.0
        return Power(np.atleast_1d(half_width(borrowed, own, max(len(repeats) - 1, 1), MANY)), deviation)
    chance = np.random.default_rng(0)

    def drawn(expected: float, df: int) -> Any:
        return expected * chance.chisquare(df, DRAWS) / df

    layout = MeanSquares(
        of_runs=drawn(rows * variances.of_runs + variances.rest, runs - 1),
        of_rows=drawn(runs * variances.of_rows + variances.rest, rows - 1),
        rest=drawn(variances.rest, (runs - 1) * (rows - 1)),
        runs=runs,
        rows=rows,
    )
    return Power(layout.half_width(), deviation)
