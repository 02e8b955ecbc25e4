"""How certain a mean of per-row scores is, and whether two of them differ: bootstrap and Wilcoxon's test, by scipy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 9_999


def _resampled(values: Sequence[float]) -> Any:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    # 20 resamples at a time stay in the processor's cache
    return bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=20, method="percentile", rng=rng)


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % bootstrap interval (percentiles) of the mean of values; None for fewer than two values."""
    return [*map(float, _resampled(values).confidence_interval)] if len(values) > 1 else None


def of_few(values: Sequence[float]) -> list[float]:
    """Student's 95 % interval of the mean of a few values, for which a bootstrap's is too narrow; of two or more."""
    from scipy.special import stdtrit

    mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
    half = stdtrit(len(values) - 1, 0.975) * error
    return [float(mean - half), float(mean + half)]


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """How two systems differ on the same rows.

    Returns:
        The mean of a - b and its 95 % bootstrap interval; `p_bootstrap`, twice the smaller share of resamples on
        one side of no difference; `p_wilcoxon` of the two-sided signed-rank test, where equal rows do not count;
        and in how many rows a is better, equal and worse.
    """
    from scipy.stats import wilcoxon

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    low_high = p_bootstrap = None
    if len(difference) > 1:
        resampled = _resampled(difference)
        low_high = [*map(float, resampled.confidence_interval)]
        means = resampled.bootstrap_distribution
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
