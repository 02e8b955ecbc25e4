"""Confidence intervals of scores, and tests of differences.

A run's score is a mean over test rows. It varies for two reasons: other rows would be easier or harder, and another
seed would give another model. For S runs scored on the same n rows, the score of row j in run i is
mean + a_i + b_j + e_ij: a two-way layout with random effects and one value in each cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
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


class Origin(Enum):
    """Variation that an interval covers."""

    ROWS = "rows"
    RUNS = "runs"
    ROWS_AND_RUNS = "rows and runs"
    BORROWED_SPREAD = "rows, and the spread of published repeats"
    BORROWED_RUNS = "the spread of published repeats"


@dataclass(frozen=True)
class Interval:
    """95 % interval of a mean score.

    Attributes:
        runs: number of runs.
        one_seed: True if several runs have the same seed.
        repeats: published scores of repeats, for a borrowed spread.
    """

    low: float
    high: float
    origin: Origin
    runs: int = 1
    one_seed: bool = False
    repeats: tuple[float, ...] = ()

    @property
    def covers_seeds(self) -> bool:
        """True if the interval covers other seeds, by runs with several seeds."""
        return self.origin in (Origin.ROWS_AND_RUNS, Origin.RUNS) and not self.one_seed

    @property
    def method(self) -> str:
        """Covered variation in words."""
        if self.origin is Origin.ROWS:
            return "rows only"
        if self.origin is Origin.BORROWED_SPREAD:
            return f"rows, and a {self._borrowed}"
        if self.origin is Origin.BORROWED_RUNS:
            return f"a {self._borrowed}"
        seeds = " of one seed" if self.one_seed else ""
        runs = f"{self.runs} runs{seeds}"
        return runs if self.origin is Origin.RUNS else f"rows and {runs}"

    @property
    def _borrowed(self) -> str:
        """Spread of the published repeats in words."""
        count, lowest, highest = len(self.repeats), min(self.repeats), max(self.repeats)
        return f"borrowed spread of {stdev(self.repeats):.2g} from {count} repeats, {lowest:g} to {highest:g}"


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

    Let u be the runs' share of the estimated variance, and f the runs' degrees of freedom. The critical value moves
    from Student's t for rows to Student's t for runs by the fraction (1 - (1 - u)^(1 + 2.5 / f))³.

    The constants in this formula were chosen for a coverage close to 95 % if the row noise is known exactly and the run
    noise is 0.01 to 1,000 times as large. The interval covers 93.5 to 96.4 % with two runs, and 94.8 to 95.8 % with 3,
    5 and 10 runs. The standard choice, Satterthwaite's degrees of freedom, covers 87 % with two runs if run noise
    dominates: two runs are often alike by chance, and their noise is then underestimated. Scores far from normal, such
    as 400 log-normal rows, cost two points of coverage, as with any method. Two runs give a wide interval with any
    method.

    Args:
        of_runs: estimated variance of the mean due to runs.
        of_rows: estimated variance of the mean due to rows.
        df_runs: degrees of freedom of `of_runs`.
        df_rows: degrees of freedom of `of_rows`.
    """
    from scipy.special import stdtrit

    total = of_runs + of_rows
    if total == 0:
        return 0.0
    fraction = (1 - (1 - of_runs / total) ** (1 + 2.5 / df_runs)) ** 3
    by_rows, by_runs = float(stdtrit(df_rows, 0.975)), float(stdtrit(df_runs, 0.975))
    return (by_rows + (by_runs - by_rows) * fraction) * total**0.5


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

    Several runs with row scores make a two-way layout. Without row scores, or where these do not tell the variance of
    rows, the interval comes from the spread of the runs and the widest of their intervals over rows, so it is not
    narrower than that of one run. The residual e_ij then counts twice, so the interval is somewhat too wide. The same
    holds for a single run that borrows the spread of published repeats, if there are any.

    Args:
        scores: score of each run.
        by_row: row scores of each run, in the same order; None if rows have no scores or differ between runs.
        within: interval over rows of each run; empty if a run has none.
        repeats: published scores of repeated runs; empty, or at least two.
    """
    mean, runs = fmean(scores), len(scores)
    if runs > 1 and by_row is not None:
        squares = mean_squares(by_row)
        if squares.knows_rows:
            half = squares.half_width()
            return Interval(mean - half, mean + half, Origin.ROWS_AND_RUNS, runs)
    if not within:
        return None
    below = max(score - low for score, (low, _) in zip(scores, within, strict=True))
    above = max(high - score for score, (_, high) in zip(scores, within, strict=True))
    if runs == 1 and not repeats:
        return Interval(mean - below, mean + above, Origin.ROWS)
    sample = scores if runs > 1 else repeats
    of_runs, df = variance(sample) / runs, len(sample) - 1
    low = mean - half_width(of_runs, (below / NORMAL) ** 2, df, MANY)
    high = mean + half_width(of_runs, (above / NORMAL) ** 2, df, MANY)
    if runs > 1:
        return Interval(low, high, Origin.ROWS_AND_RUNS, runs)
    return Interval(low, high, Origin.BORROWED_SPREAD, repeats=tuple(repeats))


def interval_on_fixed_rows(scores: Sequence[float], repeats: Sequence[float] = ()) -> Interval | None:
    """95 % interval of the mean score of repeated runs on the same rows, by Student's t.

    None if no spread is known. Equal scores tell none: a spread below their last digit, or runs without randomness.

    Args:
        scores: score of each run.
        repeats: published scores of repeated runs, whose spread a single run borrows; empty, or at least two.
    """
    mean, runs = fmean(scores), len(scores)
    sample = scores if runs > 1 else repeats
    if len(set(sample)) < 2:
        return None
    half = half_width(variance(sample) / runs, 0.0, len(sample) - 1, MANY)
    if runs > 1:
        return Interval(mean - half, mean + half, Origin.RUNS, runs)
    return Interval(mean - half, mean + half, Origin.BORROWED_RUNS, repeats=tuple(repeats))
