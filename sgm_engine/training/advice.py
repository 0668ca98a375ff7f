"""Noise levels and step sizes from data: the rules of NCSNv2 (arXiv 2006.09011, techniques 1, 2 and 4)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from sgm_engine.checks import check_int
from sgm_engine.data.images import Batches

OVERLAP = 0.567  # what all five published settings have; technique 2 itself says "≈ 0.5"


class Advice(NamedTuple):
    """Fields of a TrainConfig and of its plan."""

    sigma_begin: float
    sigma_end: float
    levels: int
    steps_per_level: int
    step_lr: float

    def to_yaml(self) -> str:
        plan = f"{{name: annealed_langevin, steps_per_level: {self.steps_per_level}, step_lr: {self.step_lr:.2g}}}"
        levels = f"sigma_begin: {self.sigma_begin:.3g}\nsigma_end: {self.sigma_end:g}\nlevels: {self.levels}"
        return f"{levels}\nplan: {plan}"


def advise(images: np.ndarray, steps_per_level: int = 5, sigma_end: float = 0.01, limit: int = 5000) -> Advice:
    """All of it for uint8 images [N, C, H, W]. limit: images that the largest distance is looked for among."""
    sigma_begin = largest_distance(images, limit)
    if sigma_begin <= sigma_end:
        raise ValueError(
            f"images: the largest distance is {sigma_begin:g}, not above sigma_end={sigma_end}: all alike?"
        )
    count = levels(sigma_begin, sigma_end, math.prod(images.shape[1:]))
    gamma = (sigma_begin / sigma_end) ** (1 / (count - 1))
    return Advice(sigma_begin, sigma_end, count, steps_per_level, step_lr(gamma, steps_per_level, sigma_end))


def largest_distance(images: np.ndarray, limit: int = 5000) -> float:
    """Technique 1, σ_1: the largest Euclidean distance between two images, pixels in [0, 1].

    Exact up to ``limit`` images; of more, that many are drawn, and the true maximum may be a little larger.
    """
    check_int("limit", limit, 2)
    if len(images) > limit:
        images = Batches(images, limit).read(0).numpy()  # the first ones of a shuffled epoch
    x = torch.from_numpy(np.array(images)).flatten(1).float() / 255
    x -= x.mean(0)
    square = x.square().sum(1)
    blocks = (square[i : i + 1000, None] + square - 2 * x[i : i + 1000] @ x.T for i in range(0, len(x), 1000))
    return max(block.max().item() for block in blocks) ** 0.5


def levels(sigma_begin: float, sigma_end: float, dim: int, overlap: float = OVERLAP) -> int:
    """Technique 2, L: geometric, neighbours' noise radii overlapping by Φ(r(γ−1) + 3γ) − Φ(r(γ−1) − 3γ) = ``overlap``.

    r = √(2·dim), γ the ratio of neighbours; dim: elements of one image.
    """
    if not 0 < sigma_end < sigma_begin:
        raise ValueError(f"need 0 < sigma_end < sigma_begin, got sigma_begin={sigma_begin}, sigma_end={sigma_end}")
    if not 0 < overlap < 0.99:
        raise ValueError(f"overlap must lie in (0, 0.99), got {overlap}")
    r = math.sqrt(2 * check_int("dim", dim, 1))

    def excess(gamma: float) -> float:
        return _normal_cdf(r * (gamma - 1) + 3 * gamma) - _normal_cdf(r * (gamma - 1) - 3 * gamma) - overlap

    high = 1 + 12 / r
    if r <= 3 or excess(high) > 0:  # a few dimensions: neighbours always overlap
        raise ValueError(f"dim={dim} is too small for this rule: choose the levels by hand")
    gamma = _bisect(excess, 1.0, high)
    return 1 + round(math.log(sigma_begin / sigma_end) / math.log(gamma))


def step_lr(gamma: float, steps_per_level: int, sigma_end: float = 0.01) -> float:
    """Technique 4, ε: what brings the variance ratio after a level, ``variance_ratio``, nearest to 1."""
    check_int("steps_per_level", steps_per_level, 1)
    if not gamma > 1:
        raise ValueError(f"gamma must be above 1, the ratio of neighbouring sigmas, got {gamma}")
    grid = np.geomspace(1e-4, 1, 4001)  # of ε/σ_L²; the ratio has one minimum there
    return float(grid[np.argmin(variance_ratio(grid, gamma, steps_per_level))] * sigma_end**2)


def variance_ratio(a: np.ndarray | float, gamma: float, steps_per_level: int) -> np.ndarray | float:
    """Variance over σ² after T steps of α = a·σ² on N(0, σ²·I), from (γσ)²: (1−a)^2T·(γ² − g) + g, g = 2/(2−a)."""
    g = 2 / (2 - a)
    return (1 - a) ** (2 * steps_per_level) * (gamma**2 - g) + g


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _bisect(f, low: float, high: float) -> float:
    """The zero of a function that is positive at ``low`` and negative at ``high``."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return low
