"""How sure a mean of per-row scores is, and whether two of them differ: bootstrap and Wilcoxon's test, by scipy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 9_999
SEED = 0
_BATCH = 200  # resamples at a time: 16 MB for 10,000 rows


def _resampled(values: Sequence[float]) -> Any:
    from scipy.stats import bootstrap

    sample = (np.asarray(values, dtype=float),)
    chance = np.random.default_rng(SEED)
    return bootstrap(sample, np.mean, n_resamples=RESAMPLES, batch=_BATCH, method="percentile", rng=chance)


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % bootstrap interval (percentiles) of the mean of values; None where fewer than two tell nothing."""
    if len(values) < 2:
        return None
    found = _resampled(values).confidence_interval
    return [float(found.low), float(found.high)]


def of_few(values: Sequence[float]) -> list[float]:
    """Student's 95 % interval of the mean of a few values, which a bootstrap makes too narrow; of two or more."""
    from scipy.stats import sem, t

    mean, error = float(np.mean(values)), float(sem(values))
    found = t.interval(0.95, len(values) - 1, loc=mean, scale=error) if error else (mean, mean)
    return [float(found[0]), float(found[1])]


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """How two systems differ on the same rows.

    Returns:
        The mean of a - b and its 95 % bootstrap interval; `p_bootstrap`, twice the smaller share of resamples on
        one side of no difference; `p_wilcoxon` of the two-sided signed-rank test, where equal rows say nothing;
        and how many rows a is better, equal and worse in.
    """
    from scipy.stats import wilcoxon

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    low_high = p_bootstrap = None
    if len(difference) > 1:
        resampled = _resampled(difference)
        found, means = resampled.confidence_interval, resampled.bootstrap_distribution
        low_high = [float(found.low), float(found.high)]
        p_bootstrap = min(1.0, 2 * float(min(np.mean(means <= 0), np.mean(means >= 0))))
    return {
        "difference": float(difference.mean()),
        "interval": low_high,
        "p_bootstrap": p_bootstrap,
        "p_wilcoxon": float(wilcoxon(difference).pvalue) if difference.any() else 1.0,
        "better": int((difference > 0).sum()),
        "equal": int((difference == 0).sum()),
        "worse": int((difference < 0).sum()),
    }
