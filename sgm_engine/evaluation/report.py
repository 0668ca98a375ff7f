"""A figure with its interval, and the two kinds of bootstrap interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value and its 95% interval; p: of a test against "equal to the reference", where there is one."""

    value: float
    low: float
    high: float
    p: float | None = None


def basic_interval(value: float, replicates: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """[2·value − upper, 2·value − lower quantile of the replicates]: takes the bias out that the replicates show."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(2 * value - high), float(2 * value - low)


def mean_estimate(x: np.ndarray, replicates: int = 1000, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The mean of x [n] and its percentile bootstrap interval."""
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"x must be a vector of at least one value, got shape {x.shape}")
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(len(x), size=len(x))].mean() for _ in range(replicates)])
    return Estimate(float(x.mean()), *map(float, np.quantile(means, [(1 - level) / 2, (1 + level) / 2])))
