"""A figure with its interval, and the two kinds of bootstrap interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value and its 95% interval.

    p: of a test of "equal to the reference", where there is one. corrected: the value without the bias of a finite
    number of images, where there is one to take out; the interval is then of this.
    """

    value: float
    low: float
    high: float
    p: float | None = None
    corrected: float | None = None


def shifted_estimate(
    value: float, replicates: np.ndarray, least: float = -np.inf, p: float | None = None, level: float = LEVEL
) -> Estimate:
    """The percentile bootstrap, shifted by the bias that the replicates show.

    Replicates [R] lie about ``value`` as it lies about the truth, skewed alike; so they are shifted, by the bias twice,
    and not reflected. least: what the truth cannot be less than.
    """
    bias = replicates.mean() - value
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2]) - 2 * bias
    return Estimate(float(value), *(max(least, float(v)) for v in (low, high)), p, max(least, float(value - bias)))


def mean_estimate(x: np.ndarray, replicates: int = 1000, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The mean of x [n] and its percentile bootstrap interval."""
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"x must be a vector of at least one value, got shape {x.shape}")
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(len(x), size=len(x))].mean() for _ in range(replicates)])
    return Estimate(float(x.mean()), *map(float, np.quantile(means, [(1 - level) / 2, (1 + level) / 2])))
