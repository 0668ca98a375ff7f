"""Fréchet distance between Gaussians fitted to two sets of features (Heusel et al., arXiv 1706.08500, eq. 6).

In Inception-v3's features this is called FID; in any other features it is not, and it is never called so here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sgm_engine.evaluation.moments import GroupedMoments, Moments
from sgm_engine.evaluation.report import Estimate


def frechet_distance(a: Moments, b: Moments, root: np.ndarray | None = None) -> float | np.ndarray:
    """‖μ_a − μ_b‖² + tr(C_a + C_b − 2·(C_a·C_b)^½), in squared units of the features.

    The trace of the root is that of (C_a^½·C_b·C_a^½)^½, which is symmetric: no complex parts and no failing root where
    a covariance is singular. With C_a = AᵀA it is that of (A·C_b·Aᵀ)^½, and with C_b = BᵀB the sum of the singular
    values of A·Bᵀ: no larger than the sets. Stacked moments, [r] of b's or of both, give [r] distances. root: C_a^½, if
    it is known.
    """
    if a.mean.shape[-1] != b.mean.shape[-1]:
        raise ValueError(f"features of both sets must have one size, got {a.mean.shape[-1]} and {b.mean.shape[-1]}")
    if a.factor is not None and b.factor is not None:
        cross = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    elif a.factor is not None or b.factor is not None:
        factor, covariance = (a.factor, b.covariance) if b.factor is None else (b.factor, a.covariance)
        cross = np.sqrt(np.linalg.eigvalsh(factor @ covariance @ factor.T).clip(0)).sum(-1)
    else:
        root = covariance_root(a) if root is None else root
        cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum(-1)
    distance = np.square(a.mean - b.mean).sum(-1) + a.trace + b.trace - 2 * cross
    return np.maximum(distance, 0.0) if distance.ndim else max(0.0, float(distance))


def covariance_root(a: Moments) -> np.ndarray | None:
    """C^½, symmetric; None where the moments have a factor instead."""
    if a.factor is not None:
        return None
    values, vectors = np.linalg.eigh(a.covariance)
    return (vectors * np.sqrt(values.clip(0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)


def _each(whole: Moments, parts: Iterable[Moments]) -> np.ndarray:
    """The distances of ``whole`` to each of ``parts``, one after the other."""
    root = covariance_root(whole)
    return np.concatenate([np.atleast_1d(frechet_distance(whole, part, root)) for part in parts])


class _Jackknife(NamedTuple):
    """What leaving out each group of one set, the others whole, says of a figure: its bias and variance."""

    bias: float
    variance: float
    groups: int


def frechet(samples: GroupedMoments, reference: GroupedMoments, interval: bool = True) -> Estimate:
    """The distance, and a 95% interval of the one that infinitely many images would give.

    The plain value is too large by a bias of order D/n, as published values are: compare those at equal n only. The
    corrected value and the interval have it taken out to first order. Both come from leaving out each group of either
    set in turn (the delete-a-group jackknife). The interval is Student's in the distance's square root, whose spread
    depends little on the distance itself. interval False, or two vectors: the value alone, its interval NaN.
    """
    target, mine = reference.moments(), samples.moments()
    value = frechet_distance(target, mine)
    if not interval or min(target.n, mine.n) < 3:
        return Estimate(value, np.nan, np.nan)
    of_samples = _each(target, samples.without_each())
    of_reference = _each(mine, reference.without_each())
    bias, half = _spread(_jackknife(of_samples, value), _jackknife(of_reference, value))
    root = np.sqrt(value)
    in_root = half / (2 * root) if value else 0.0
    low, high = max(root - in_root, 0.0) ** 2, (root + in_root) ** 2
    low, high, corrected = (max(0.0, float(v - bias)) for v in (low, high, value))
    return Estimate(value, low, high, None, corrected)


def frechet_difference(first: GroupedMoments, second: GroupedMoments, reference: GroupedMoments) -> Estimate:
    """Distance of ``first`` minus that of ``second``, with a 95% interval: below 0 throughout, the first is better.

    A jackknife as in ``frechet``; both distances see the same reference. At equal n their biases cancel to first order.
    """
    target, one, two = reference.moments(), first.moments(), second.moments()
    to_one, to_two = frechet_distance(target, one), frechet_distance(target, two)
    value = to_one - to_two
    if min(target.n, one.n, two.n) < 3:
        return Estimate(value, np.nan, np.nan)
    parts = (
        _each(target, first.without_each()) - to_two,
        to_one - _each(target, second.without_each()),
        _each(one, reference.without_each()) - _each(two, reference.without_each()),
    )
    bias, half = _spread(*(_jackknife(part, value) for part in parts))
    return Estimate(value, value - bias - half, value - bias + half, None, value - bias)


def _jackknife(left_out: np.ndarray, value: float) -> _Jackknife:
    """left_out [G]: the figure without each group; value: with all."""
    groups, mean = len(left_out), left_out.mean()
    return _Jackknife((groups - 1) * (mean - value), (groups - 1) * left_out.var(), groups)


def _spread(*sets: _Jackknife) -> tuple[float, float]:
    """The bias of all sets together, and half a 95% interval: Student's, with the fewest degrees of freedom."""
    quantile = _student(min(s.groups for s in sets) - 1)
    return sum(s.bias for s in sets), quantile * float(np.sqrt(sum(s.variance for s in sets)))


def _student(freedom: int) -> float:
    """The 97.5% quantile of Student's t (Cornish and Fisher's expansion; 0.01% off at 6 degrees, less at more)."""
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))
