"""The exact mixture of SPEC.md §5 in the plane: its score, as a model, and its probability flow solved finely."""

from itertools import pairwise

import numpy as np
import torch

from sgm_engine.kernels import noise

WEIGHT = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEAN = torch.tensor([[-1, -0.5], [1, 0.8], [0.2, -1.2]], dtype=torch.float64)
STD = torch.tensor([0.15, 0.25, 0.4], dtype=torch.float64)


def score(x, sigma):
    """x [n, 2, …] at sigma [n] or a number, float64."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    v = (STD**2 + sigma[..., None] ** 2).reshape(-1, 3, *(1,) * (x.dim() - 1))  # [n or 1, 3, 1, …]
    d = MEAN.reshape(1, 3, 2, *(1,) * (x.dim() - 2)) - x[:, None]  # [n, 3, 2, …]
    log_p = WEIGHT.log().reshape(3, *(1,) * (x.dim() - 1)) - v.log() - d.square().sum(2, keepdim=True) / (2 * v)
    return (torch.softmax(log_p, 1) / v * d).sum(1)


def model(sigmas):
    """The same as an engine's model of samples [2, H, W], a plane of points each: float32 in and out."""
    sigmas = torch.tensor(np.array(sigmas))
    return lambda x, level: score(x.double(), sigmas[level]).float()


def data(n, seed=0):
    """n points of the mixture itself, float64 [n, 2]."""
    rng = np.random.default_rng(seed)
    mode = rng.choice(3, n, p=WEIGHT.numpy())
    return MEAN.numpy()[mode] + STD.numpy()[mode, None] * rng.standard_normal((n, 2))


def start(n, side, scale, seed=0):
    """x₀ of samples 0 … n − 1 of a plan that starts from scale·N(0, 1), float64 [n, 2, side, side]."""
    z = noise.fill((n, 2, side, side), np.full(n, seed), np.arange(n), 0, 0, "normal")
    return torch.from_numpy(z).double() * float(np.float32(scale))


def flow(x, high, low, steps):
    """The probability flow dx/dσ = −σ·score from σ = high to low by Runge–Kutta's fourth order in ln σ."""
    times = np.linspace(np.log(high), np.log(low), steps + 1)

    def slope(x, t):
        return -np.exp(2 * t) * score(x, np.exp(t))

    for t, after in pairwise(times):
        h = after - t
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, t + h / 2)
        k3 = slope(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, after))
    return x
