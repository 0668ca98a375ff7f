"""Distances between two sets of vectors that need no Gaussian: sliced Wasserstein and maximum mean discrepancy."""

from __future__ import annotations

import numpy as np

from sgm_engine.evaluation.report import Estimate, shifted_estimate

KERNELS = ("rbf", "polynomial")
SLAB = 16  # projections sorted at a time


def wasserstein_1d(x: np.ndarray, y: np.ndarray) -> float:
    """W₁ = ∫|F − G| of two samples on the line, x [n] and y [m], of any sizes."""
    x, y = np.asarray(x, np.float64).reshape(1, -1), np.asarray(y, np.float64).reshape(1, -1)
    return float(_Lines(x, y).distances(np.ones(x.shape[1]), np.ones(y.shape[1]))[0])


def sliced_wasserstein(
    x: np.ndarray, y: np.ndarray, projections: int = 128, replicates: int = 200, seed: int = 0
) -> Estimate:
    """Mean of W₁ over random unit directions (Rabin et al. 2011), in units of x [n, D] and y [m, D].

    The interval is a bootstrap over both sets, for these directions. Two samples of one law are some distance
    apart (of order n^-½): compare with the floor.
    """
    x, y = _matrices(x, y)
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    ones = np.ones(len(x)), np.ones(len(y))
    weights = [(_resample(rng, len(x)), _resample(rng, len(y))) for _ in range(replicates)]
    value, drawn = 0.0, np.zeros(replicates)
    for start in range(0, projections, SLAB):
        slab = directions[:, start : start + SLAB]
        lines = _Lines((x @ slab).T, (y @ slab).T)
        value += lines.distances(*ones).sum() / projections
        drawn += np.array([lines.distances(*pair).sum() for pair in weights]) / projections
    return shifted_estimate(value, drawn, 0.0)


class _Lines:
    """Samples x [P, n] and y [P, m] on P lines, sorted together once; then W₁ for any weights of the points."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        both = np.concatenate([x, y], 1)
        self.order = both.argsort(1)
        self.gaps = np.diff(np.take_along_axis(both, self.order, 1))

    def distances(self, x_weights: np.ndarray, y_weights: np.ndarray) -> np.ndarray:
        """[P], for weights [n] and [m]."""
        steps = np.concatenate([x_weights / x_weights.sum(), -y_weights / y_weights.sum()])
        return (np.abs(steps[self.order].cumsum(1)[:, :-1]) * self.gaps).sum(1)


def mmd(
    x: np.ndarray, y: np.ndarray, kernel: str = "rbf", permutations: int = 500, replicates: int = 200, seed: int = 0
) -> Estimate:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) of x [n, D] and y [m, D]; may be negative.

    kernel: "rbf", exp(−‖x−y‖²/(2h²)) with h² the median of all squared distances; "polynomial", (x·y/D + 1)³, that of
    KID (arXiv 1801.01401). p: permutation test of "both are draws of one law", exact at any n, at least
    1/(permutations + 1). The interval is a bootstrap over both sets; where the two laws are equal, trust p and not it.
    Memory: 4·(n + m)² bytes.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}")
    x, y = _matrices(x, y)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"mmd needs at least 2 vectors of each set, got {n} and {m}")
    gram = _gram(np.concatenate([x, y]), kernel)
    np.fill_diagonal(gram, 0.0)
    rng = np.random.default_rng(seed)

    first = np.zeros((n + m, 1 + permutations), np.float32)  # a column is one choice of which vectors are "x"
    first[:n, 0] = 1
    for column in range(1, 1 + permutations):
        first[rng.permutation(n + m)[:n], column] = 1
    values = _statistics(gram, first, 1 - first)
    value = float(values[0])
    p = (1 + int((values[1:] >= value - 1e-12 * abs(value)).sum())) / (1 + permutations)

    weights = np.zeros((2, n + m, replicates), np.float32)
    for column in range(replicates):
        weights[0, :n, column], weights[1, n:, column] = _resample(rng, n), _resample(rng, m)
    found = _statistics(gram, *weights)
    found = found[np.isfinite(found)]  # one vector drawn n times has no pairs
    if len(found) < 2:
        return Estimate(value, np.nan, np.nan, p)
    return shifted_estimate(value, found, p=p)._replace(corrected=None)


def _statistics(gram: np.ndarray, x_weights: np.ndarray, y_weights: np.ndarray) -> np.ndarray:
    """[R]: the statistic for each column of weights [N, R]. gram [N, N] has a zero diagonal: no vector meets itself."""

    def mean(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
        pairs = a.sum(0, np.float64) * b.sum(0, np.float64) - (a * b).sum(0, np.float64)
        return np.divide((a * product).sum(0, np.float64), pairs, out=np.full_like(pairs, np.nan), where=pairs > 0)

    with_x, with_y = gram @ x_weights, gram @ y_weights
    return (
        mean(x_weights, x_weights, with_x) + mean(y_weights, y_weights, with_y) - 2 * mean(x_weights, y_weights, with_y)
    )


def _gram(z: np.ndarray, kernel: str) -> np.ndarray:
    if kernel == "polynomial":
        return ((z @ z.T / z.shape[1] + 1) ** 3).astype(np.float32)
    z = z - z.mean(0)
    squares = np.square(z).sum(1)
    distances = (squares[:, None] + squares - 2 * z @ z.T).clip(0)
    scale = np.median(distances[np.triu_indices(len(z), 1)])
    if scale == 0:
        raise ValueError("rbf: more than half of all pairs of vectors are equal; use kernel='polynomial'")
    return np.exp(-distances / (2 * scale)).astype(np.float32)


def _resample(rng: np.random.Generator, n: int) -> np.ndarray:
    """How often a bootstrap replicate takes each of n."""
    return rng.multinomial(n, np.full(n, 1 / n))


def _matrices(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"both sets must be [N, D] of one D, got {list(x.shape)} and {list(y.shape)}")
    if not (len(x) and len(y)):
        raise ValueError(f"both sets need vectors, got {len(x)} and {len(y)}")
    for name, z in (("first", x), ("second", y)):
        if not np.isfinite(z).all():
            raise ValueError(f"the {name} set holds NaN or infinity")
    return x, y
