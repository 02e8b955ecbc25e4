"""Confidence intervals of scores, and tests of differences.

A run's score is a mean over test rows. It varies for two reasons: other rows would be easier or harder, and another
seed would give another model. For S runs scored on the same n rows, the score of row j in run i is
mean + a_i + b_j + e_ij: a two-way layout with random effects and one value in each cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

import numpy as np

from ..metrics.metric import FEWEST, NORMAL, bootstrap


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Difference between two systems on the same rows.

    Returns:
        Mean of a - b (`difference`) with its 95 % bootstrap `interval`. `p_wilcoxon` is the p-value of the two-sided
        signed-rank test, see `_signed_rank`. Interval and p-value are None below `FEWEST` rows. `better`, `equal` and
        `worse` count the rows in which the first score is larger, equal or smaller.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    signs = np.sign(difference)
    interval = p_wilcoxon = None
    if len(difference) >= FEWEST:
        interval = [*bootstrap(difference.tolist())]
        p_wilcoxon = _signed_rank(difference[difference != 0])
    return {
        "difference": float(difference.mean()),
        "interval": interval,
        "p_wilcoxon": p_wilcoxon,
        "better": int((signs == 1).sum()),
        "equal": int((signs == 0).sum()),
        "worse": int((signs == -1).sum()),
    }


def _signed_rank(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test for differences other than 0.

    Up to `EXACT` pairs, it counts the sums of ranks over all combinations of signs, so it is exact for ties, too. The
    normal approximation beyond would give 0.0075 instead of 0.0129 for 12 against 2 rows of equal differences.
    """
    from scipy.stats import rankdata, wilcoxon

    if len(differences) > EXACT:
        return float(wilcoxon(differences).pvalue)
    ranks = (2 * rankdata(np.abs(differences))).astype(int)  # ties have half ranks
    chances = np.zeros(ranks.sum() + 1)  # chance of each sum of the positive ranks
    chances[0] = 1
    for rank in ranks:
        chances = (chances + np.roll(chances, rank)) / 2
    sums = [ranks[differences > 0].sum(), ranks[differences < 0].sum()]
    return min(1.0, 2 * float(chances[: min(sums) + 1].sum()))


EXACT = 500
MANY = 1e6  # degrees of freedom of a variance that counts as known


@dataclass(frozen=True)
class Interval:
    """95 % interval of a mean score.

    Attributes:
        over_rows: True if it covers other rows.
        runs: number of runs.
        one_seed: True if several runs have the same seed.
        repeats: published scores of repeats, if a single run borrows their spread.
    """

    low: float
    high: float
    over_rows: bool = True
    runs: int = 1
    one_seed: bool = False
    repeats: tuple[float, ...] = ()

    @property
    def covers_seeds(self) -> bool:
        """True if the interval covers other seeds, by runs with several seeds."""
        return self.runs > 1 and not self.one_seed

    @property
    def method(self) -> str:
        """Covered variation in words, and the method that combines it."""
        if self.repeats:
            published = f"{len(self.repeats)} published repeats, {min(self.repeats):g} to {max(self.repeats):g}"
            runs = f"a run-to-run standard deviation of {stdev(self.repeats):.2g} from {published}"
        elif self.runs > 1:
            runs = f"{self.runs} runs of one seed" if self.one_seed else f"{self.runs} runs"
        else:
            return "rows only"
        return f"rows and {runs} (Banerjee)" if self.over_rows else f"{runs} (Student's t)"


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares of a layout: between runs, between rows, and residual."""

    of_runs: float
    of_rows: float
    rest: float
    runs: int
    rows: int

    @property
    def knows_rows(self) -> bool:
        """True if the estimated variance of rows is positive; the other term allows for rounding errors."""
        return self.of_rows * (1 - 1e-9) > self.rest

    def half_width(self) -> float:
        """Half-width of the 95 % interval of the mean over runs and rows."""
        size = self.runs * self.rows
        of_rows = max(self.of_rows - self.rest, 0) / size  # an estimated variance can be negative
        return half_width(self.of_runs / size, of_rows, self.runs - 1, self.rows - 1)


def half_width(of_runs: float, of_rows: float, df_runs: float, df_rows: float) -> float:
    """Half-width of the 95 % interval of a mean over runs and rows.

    Each variance is multiplied by the square of its own Student's t: S. K. Banerjee (1960), "Approximate confidence
    interval for linear functions of means of k populations when the population variances are not equal", Sankhya 22,
    357-358. It is proven to cover at least 95 % for normal scores and independent estimates. Two runs give a wide
    interval with any method; `tools/interval_coverage.py` shows how often the interval covers the truth.

    Args:
        of_runs: estimated variance of the mean due to runs.
        of_rows: estimated variance of the mean due to rows.
        df_runs: degrees of freedom of `of_runs`.
        df_rows: degrees of freedom of `of_rows`.
    """
    from scipy.special import stdtrit

    by_runs, by_rows = stdtrit([df_runs, df_rows], 0.975)
    return float(of_runs * by_runs**2 + of_rows * by_rows**2) ** 0.5


def mean_squares(scores: Sequence[Sequence[float]]) -> MeanSquares:
    """Mean squares of scores[run][row], for at least two runs and two rows."""
    table = np.asarray(scores, dtype=float)
    runs, rows = table.shape
    by_run, by_row, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    rest = table - by_run[:, None] - by_row[None, :] + mean
    of_runs = float(rows * ((by_run - mean) ** 2).sum() / (runs - 1))
    of_rows = float(runs * ((by_row - mean) ** 2).sum() / (rows - 1))
    of_rest = float((rest**2).sum() / ((runs - 1) * (rows - 1)))
    return MeanSquares(of_runs, of_rows, of_rest, runs, rows)


def interval_of_mean(
    scores: Sequence[float],
    by_row: Sequence[Sequence[float]] | None,
    within: Sequence[Sequence[float]] = (),
    repeats: Sequence[float] = (),
) -> Interval | None:
    """95 % interval of the mean score of repeated runs; None if the spread over rows is unknown.

    Several runs with row scores make a two-way layout. Otherwise the interval adds two variances: the spread of the
    runs (or of published repeats, for a single run), and the widest of their intervals over rows. It is never narrower
    than that of one run, and somewhat too wide, because the residual e_ij counts twice.

    Args:
        scores: score of each run.
        by_row: row scores of each run, in the same order; None for a single run, and if rows have no scores or differ
            between runs.
        within: interval over rows of each run; empty if a run has none.
        repeats: published scores of repeated runs; empty, or at least two.
    """
    mean, runs = fmean(scores), len(scores)
    if by_row is not None:
        squares = mean_squares(by_row)
        if squares.knows_rows:
            half = squares.half_width()
            return Interval(mean - half, mean + half, runs=runs)
    if not within:
        return None
    below = max(score - low for score, (low, _) in zip(scores, within, strict=True))
    above = max(high - score for score, (_, high) in zip(scores, within, strict=True))
    published = tuple(repeats) if runs == 1 else ()
    sample = published or scores
    if len(sample) == 1:
        return Interval(mean - below, mean + above)
    of_runs, df = variance(sample) / runs, len(sample) - 1
    low = mean - half_width(of_runs, (below / NORMAL) ** 2, df, MANY)
    high = mean + half_width(of_runs, (above / NORMAL) ** 2, df, MANY)
    return Interval(low, high, runs=runs, repeats=published)


def interval_on_fixed_rows(scores: Sequence[float], repeats: Sequence[float] = ()) -> Interval | None:
    """95 % interval of the mean score of repeated runs on the same rows, by Student's t.

    None if the spread between runs is unknown. Equal scores do not show it: they may be rounded, or not random.

    Args:
        scores: score of each run.
        repeats: published scores of repeated runs, whose spread a single run borrows; empty, or at least two.
    """
    mean, runs = fmean(scores), len(scores)
    published = tuple(repeats) if runs == 1 else ()
    sample = published or scores
    if len(set(sample)) < 2:
        return None
    half = half_width(variance(sample) / runs, 0.0, len(sample) - 1, MANY)
    return Interval(mean - half, mean + half, over_rows=False, runs=runs, repeats=published)
