"""What nearest neighbours tell: precision, recall, density, coverage, and whether samples are copies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sgm_engine.evaluation.distances import _matrices
from sgm_engine.evaluation.report import Estimate, mean_estimate

BLOCK = 1024  # rows of a distance matrix that exist at a time


class Neighbourhood(NamedTuple):
    """precision: share of samples within the reference's k-NN balls, and recall the reverse (arXiv 1904.06991).

    density: mean number of those balls a sample lies in, over k; coverage: share of reference images with a sample in
    their own ball (arXiv 2002.09797). Density may exceed 1. Intervals resample the set that the mean runs over, given
    the other: samples for precision and density, the reference for recall and coverage.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def neighbourhood(
    samples: np.ndarray, reference: np.ndarray, k: int = 5, replicates: int = 1000, seed: int = 0
) -> Neighbourhood:
    """samples [n, D], reference [m, D], both larger than k. A vector is not its own neighbour; a ball has its border.

    All four depend on n and m: compare at equal sizes. Memory: 8·1,024·max(n, m) bytes.
    """
    samples, reference = _matrices(samples, reference)
    if not 1 <= k < min(len(samples), len(reference)):
        raise ValueError(f"k must be at least 1 and below both sizes, got {k} for {len(samples)} and {len(reference)}")
    real_radius, fake_radius = _radii(reference, k), _radii(samples, k)
    n, m = len(samples), len(reference)
    balls, covered, recalled = np.zeros(n), np.zeros(m, bool), np.zeros(m, bool)
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        squared = _squared(samples[rows], reference)
        balls[rows] = (squared <= real_radius).sum(1)
        covered |= squared.min(0) <= real_radius
        recalled |= (squared <= fake_radius[rows, None]).any(0)
    columns = balls > 0, recalled, balls / k, covered
    return Neighbourhood(*(mean_estimate(column, replicates, seed) for column in columns))


class Nearest(NamedTuple):
    """For each of n images the nearest of a pool: its distance [n] and its index [n]."""

    distance: np.ndarray
    index: np.ndarray


def nearest(x: np.ndarray, pool_blocks) -> Nearest:
    """Euclidean. x: [n, D]; pool_blocks: an iterable of [b, D], read once, so the pool may be any size."""
    x = np.asarray(x, np.float64)
    best, index, start = np.full(len(x), np.inf), np.zeros(len(x), np.int64), 0
    for block in pool_blocks:
        squared = _squared(x, np.asarray(block, np.float64))
        here = squared.argmin(1)
        value = squared[np.arange(len(x)), here]
        better = value < best
        best[better], index[better] = value[better], here[better] + start
        start += len(block)
    if start == 0:
        raise ValueError("the pool of nearest neighbours is empty")
    return Nearest(np.sqrt(best), index)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """[n]: squared distance from each vector to its k-th nearest other one."""
    out = np.empty(len(x))
    for start in range(0, len(x), BLOCK):
        squared = _squared(x[start : start + BLOCK], x)
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        out[start : start + BLOCK] = np.partition(squared, k - 1, 1)[:, k - 1]
    return out


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)).clip(0)
