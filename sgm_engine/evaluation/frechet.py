"""Fréchet distance between Gaussians fitted to two sets of features (Heusel et al., arXiv 1706.08500, eq. 6).

In Inception-v3's features this is called FID; in any other features it is not, and it is never called so here.
"""

from __future__ import annotations

import numpy as np

from sgm_engine.evaluation.moments import GroupedMoments, Moments
from sgm_engine.evaluation.report import Estimate, shifted_estimate


def frechet_distance(a: Moments, b: Moments) -> float | np.ndarray:
    """‖μ_a − μ_b‖² + tr(C_a + C_b − 2·(C_a·C_b)^½), in squared units of the features.

    The trace of the root is that of (C_a^½·C_b·C_a^½)^½, which is symmetric: no complex parts and no failing root where
    a covariance is singular. Stacked moments give [r] distances.
    """
    if a.mean.shape[-1] != b.mean.shape[-1]:
        raise ValueError(f"features of both sets must have one size, got {a.mean.shape[-1]} and {b.mean.shape[-1]}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    middle = np.linalg.eigvalsh(root @ b.covariance @ root)
    traces = np.trace(a.covariance, axis1=-2, axis2=-1) + np.trace(b.covariance, axis1=-2, axis2=-1)
    distance = np.square(a.mean - b.mean).sum(-1) + traces - 2 * np.sqrt(middle.clip(0)).sum(-1)
    return np.maximum(distance, 0.0) if distance.ndim else max(0.0, float(distance))


def frechet_replicates(
    samples: GroupedMoments, reference: GroupedMoments, replicates: int, seed: int, stream: int = 1
) -> np.ndarray:
    """Bootstrap replicates [R] of the distance; both sets are resampled, by groups.

    Equal seeds resample the reference alike, so replicates of two sets of samples (different ``stream``) pair up.
    """
    of_reference, of_samples = np.random.default_rng([seed, 0]), np.random.default_rng([seed, stream])
    pairs = zip(reference.resample(replicates, of_reference), samples.resample(replicates, of_samples), strict=True)
    return np.concatenate([frechet_distance(*pair) for pair in pairs])


def frechet(samples: GroupedMoments, reference: GroupedMoments, replicates: int = 200, seed: int = 0) -> Estimate:
    """The distance, and a 95% interval (shifted_estimate) of the one that infinitely many images would give.

    The plain value is too large by a bias of order D/n, as published values are: compare those at equal n only. The
    corrected value and the interval have it taken out to first order.
    """
    value = frechet_distance(reference.moments(), samples.moments())
    drawn = frechet_replicates(samples, reference, replicates, seed)
    return shifted_estimate(value, drawn, 0.0)


def frechet_difference(
    first: GroupedMoments, second: GroupedMoments, reference: GroupedMoments, replicates: int = 200, seed: int = 0
) -> Estimate:
    """Distance of ``first`` minus that of ``second``, with a 95% interval: below 0 throughout, the first is better.

    At equal n their biases cancel to first order.
    """
    target = reference.moments()
    value = frechet_distance(target, first.moments()) - frechet_distance(target, second.moments())
    drawn = frechet_replicates(first, reference, replicates, seed, 1)
    drawn -= frechet_replicates(second, reference, replicates, seed, 2)
    return shifted_estimate(value, drawn)
