"""Mean and covariance of a stream of feature vectors, in float64, and bootstraps of what they decide."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """n vectors: their mean [D] and their unbiased covariance (denominator n − 1) [D, D]."""

    n: int
    mean: np.ndarray
    covariance: np.ndarray


class GroupedMoments:
    """Moments of a stream, kept apart for G groups: vector i belongs to group i mod G.

    Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1979): each block is centred on its own mean,
    so nothing cancels. Resampling whole groups bootstraps a function of the moments when the vectors are long gone.
    """

    def __init__(self, dim: int, groups: int | None = None):
        """groups: None takes 64, or as few as 8 where 64 covariances would need more than 512 MiB."""
        groups = max(8, min(64, 2**29 // (8 * dim * dim))) if groups is None else groups
        self.n = np.zeros(groups, np.int64)
        self.mean = np.zeros((groups, dim))
        self.scatter = np.zeros((groups, dim, dim))  # Σ (x − mean)(x − mean)ᵀ
        self._seen = 0

    def update(self, x: np.ndarray) -> None:
        """x: [b, D], any floating dtype. ValueError if something in it is not finite."""
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or x.shape[1] != self.mean.shape[1]:
            raise ValueError(f"x must be [b, {self.mean.shape[1]}], got {list(x.shape)}")
        if not np.isfinite(x).all():
            raise ValueError("x holds NaN or infinity: the extractor's features of some image are not finite")
        groups = len(self.n)
        for offset in range(min(groups, len(x))):
            part, g = x[offset::groups], (self._seen + offset) % groups
            mean = part.mean(0)
            centred, shift = part - mean, mean - self.mean[g]
            n, total = self.n[g], self.n[g] + len(part)
            self.scatter[g] += centred.T @ centred + np.outer(shift, shift) * (n * len(part) / total)
            self.mean[g] += shift * (len(part) / total)
            self.n[g] = total
        self._seen += len(x)

    def moments(self, weights: np.ndarray | None = None) -> Moments:
        """Of everything, or with each group taken ``weights`` [G] times."""
        counts = self.n if weights is None else self.n * weights
        total = int(counts.sum())
        if total < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {total}")
        pivot = self.mean[self.n > 0].mean(0)
        shift = self.mean - pivot
        mean = counts @ shift / total
        scatter = np.tensordot(np.ones(len(counts)) if weights is None else weights, self.scatter, 1)
        between = shift - mean
        scatter += (between * counts[:, None]).T @ between
        return Moments(total, pivot + mean, scatter / (total - 1))

    def resample(self, rng: np.random.Generator) -> Moments:
        """A bootstrap replicate: as many groups, drawn with replacement."""
        filled = int((self.n > 0).sum())
        if filled < 2:
            raise ValueError(f"a bootstrap needs at least 2 vectors, got {filled}")
        weights = np.zeros(len(self.n))
        weights[self.n > 0] = rng.multinomial(filled, np.full(filled, 1 / filled))
        return self.moments(weights)
