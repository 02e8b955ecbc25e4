"""How certain a mean of per-row scores is, and whether two of them differ: bootstrap and Wilcoxon's test.

The bootstrap is scipy's to the last digit, which is not called for it: importing it takes longer than all else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 9_999


def _resampled(*columns: np.ndarray) -> list[np.ndarray]:
    """The means of resamples of some columns, the same rows of each, and in each call with as many rows."""
    rng = np.random.default_rng(0)
    rows, batch = len(columns[0]), 20  # which stays in the processor's cache
    means: list[list[np.ndarray]] = [[] for _ in columns]
    for done in range(0, RESAMPLES, batch):
        drawn = rng.integers(0, rows, (min(batch, RESAMPLES - done), rows))
        for column, of_column in zip(columns, means, strict=True):
            of_column.append(column[drawn].mean(axis=1))
    return [*map(np.concatenate, means)]


def _within(means: np.ndarray) -> list[float]:
    """What the middle 95 % of the means of resamples lie within, computed as scipy does: numpy's own percentiles
    round the last digit otherwise."""
    ordered, count = np.sort(means), len(means)
    outside = (1 - 0.95) / 2
    bounds = []
    for share in (outside, 1 - outside):
        place, part = divmod(share * count + 1 - share, 1)
        low, high = ordered[int(place) - 1 : int(place) + 1]
        bounds.append(float((1 - part) * low + part * high))
    return bounds


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % bootstrap interval (percentiles) of the mean of values; None for fewer than two values."""
    return each({"": values})[""]


def each(columns: Mapping[str, Sequence[float]]) -> dict[str, list[float] | None]:
    """The intervals of several scores of the same rows, whose resamples are drawn once for all; see `interval`."""
    values = [np.asarray(column, dtype=float) for column in columns.values()]
    if not values or len(values[0]) < 2:
        return dict.fromkeys(columns)
    return dict(zip(columns, map(_within, _resampled(*values)), strict=True))


def of_few(values: Sequence[float]) -> list[float]:
    """Student's 95 % interval of the mean of a few values, for which a bootstrap's is too narrow; of two or more."""
    from scipy.special import stdtrit

    mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
    half = stdtrit(len(values) - 1, 0.975) * error
    return [float(mean - half), float(mean + half)]


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """How two systems differ on the same rows.

    Returns:
        The mean of a - b and its 95 % bootstrap interval; `p_bootstrap`, twice (k + 1) / (B + 1), where k of B
        resamples are on the rarer side of no difference; `p_wilcoxon` of the two-sided signed-rank test, where equal
        rows do not count; and in how many rows a is better, equal and worse.
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
