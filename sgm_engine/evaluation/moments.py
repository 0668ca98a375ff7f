"""Mean and covariance of a stream of feature vectors, in float64, and what they are without a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

STACKED = 2**20  # elements of the covariances that are resampled at a time
LARGE = 512  # vectors longer than this are kept themselves as long as they are fewer than their length…
KEPT = 2**30  # …and take at most so many bytes
DENSE = 4096  # the longest whose covariances are kept, eight of them
GROUPS = 16  # of vectors that are kept


class Moments(NamedTuple):
    """n vectors: their mean [D] and their unbiased covariance (denominator n − 1) [D, D]; or r such, stacked.

    Of fewer vectors than they are long, covariance is None and factor [n, D] has factorᵀ·factor in its place.
    """

    n: int
    mean: np.ndarray
    covariance: np.ndarray | None
    factor: np.ndarray | None = None

    @property
    def trace(self) -> np.ndarray | float:
        """Of the covariance."""
        if self.factor is not None:
            return float(np.square(self.factor).sum())
        return np.trace(self.covariance, axis1=-2, axis2=-1)

    @classmethod
    def of(cls, x: np.ndarray) -> Moments:
        """Of vectors x [n, D], as a factor."""
        if len(x) < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {len(x)}")
        mean = x.mean(0)
        return cls(len(x), mean, None, (x - mean) / np.sqrt(len(x) - 1))


def most_kept(dim: int) -> int:
    """How many vectors of ``dim`` are kept themselves."""
    return min(dim, KEPT // (8 * dim))


def check_affordable(dim: int, n: int) -> None:
    """ValueError where moments of n vectors of ``dim`` features have no room."""
    if dim > DENSE and n > most_kept(dim):
        size = 8 * dim * dim * 8 / 2**30
        raise ValueError(
            f"{n} images of {dim} features each need covariances of {size:.0f} GiB: measure in fewer features, with "
            f"--features classifier:FILE or inception:FILE, or at most {most_kept(dim)} images"
        )


class GroupedMoments:
    """Moments of a stream, kept apart for G groups: vector i belongs to group i mod G.

    Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1979): each block is centred on its own mean,
    so nothing cancels. Leaving out whole groups gives a jackknife of any function of the moments, when the vectors are
    long gone. A few long vectors (LARGE) are kept themselves: their covariance would be larger, and of low rank.
    """

    def __init__(self, dim: int, groups: int | None = None):
        """groups: None takes 64, or as few as 8 where 64 covariances would need more than 512 MiB."""
        self.dim, self._seen, self._groups = dim, 0, groups
        self._kept: list[np.ndarray] | None = [] if groups is None and dim > LARGE else None
        if self._kept is None:
            self._allocate(max(8, min(64, 2**29 // (8 * dim * dim))) if groups is None else groups)

    def _allocate(self, groups: int) -> None:
        self.n = np.zeros(groups, np.int64)
        self.mean = np.zeros((groups, self.dim))
        self.scatter = np.zeros((groups, self.dim, self.dim))  # Σ (x − mean)(x − mean)ᵀ

    def update(self, x: np.ndarray) -> None:
        """x: [b, D], any floating dtype. ValueError if something in it is not finite."""
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [b, {self.dim}], got {list(x.shape)}")
        if not np.isfinite(x).all():
            raise ValueError("x holds NaN or infinity: the extractor's features of some image are not finite")
        if self._kept is not None:
            check_affordable(self.dim, self._seen + len(x))
            self._kept.append(x.copy())
            self._seen += len(x)
            if self._seen > most_kept(self.dim):
                kept, self._kept, self._seen = self._kept, None, 0
                self._allocate(8)
                for block in kept:
                    self.update(block)
            return
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

    def moments(self) -> Moments:
        """Of every vector so far."""
        if self._kept is not None:
            return Moments.of(self._vectors())
        n, mean, covariance, _ = self._weighted(np.ones((1, len(self.n))))
        return Moments(int(n[0]), mean[0], covariance[0])

    def without_each(self) -> Iterator[Moments]:
        """The moments with one group left out, for each group that holds vectors, in turn.

        They come stacked, some at a time: n [r], mean [r, D], covariance [r, D, D]; of vectors that are kept one by
        one. ValueError for fewer than 3 vectors.
        """
        if self._kept is not None:
            x = self._vectors()
            if len(x) < 3:
                raise ValueError(f"an interval needs at least 3 vectors, got {len(x)}")
            group = np.arange(len(x)) % GROUPS
            yield from (Moments.of(x[group != g]) for g in range(min(GROUPS, len(x))))
            return
        filled = np.flatnonzero(self.n)
        if self.n.sum() < 3:
            raise ValueError(f"an interval needs at least 3 vectors, got {int(self.n.sum())}")
        at_once = max(1, STACKED // self.mean.shape[1] ** 2)
        for start in range(0, len(filled), at_once):
            left_out = filled[start : start + at_once]
            weights = np.ones((len(left_out), len(self.n)))
            weights[np.arange(len(left_out)), left_out] = 0
            yield self._weighted(weights)

    def _vectors(self) -> np.ndarray:
        return np.concatenate(self._kept) if self._kept else np.zeros((0, self.dim))

    def _weighted(self, weights: np.ndarray) -> Moments:
        """Stacked moments with group g taken weights[r, g] times."""
        counts = weights * self.n  # [r, G]
        total = counts.sum(1)
        if total.min() < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {int(total.min())}")
        pivot = self.mean[self.n > 0].mean(0)
        shift = np.where(self.n[:, None] > 0, self.mean - pivot, 0.0)  # [G, D]
        mean = counts @ shift / total[:, None]
        between = shift - mean[:, None]  # [r, G, D]
        scatter = np.tensordot(weights, self.scatter, 1) + np.einsum(
            "rg,rgi,rgj->rij", counts, between, between, optimize=True
        )
        return Moments(total, pivot + mean, scatter / (total - 1)[:, None, None])
