"""log p(x) under a score model, by its probability flow (arXiv 2011.13456, appendix D.2).

dx/dσ = −σ·score(x, σ) carries a point from the smallest sigma to the largest, where almost only noise is left:

    log p_σL(x) = log N(x(σ_1); mean, std²·I) − ∫ σ²·tr ∇score(x(σ), σ) d(log σ)     from σ_L to σ_1

the trace by Skilling's and Hutchinson's estimate vᵀ∇score·v with random signs v. The integrand lies between −D and 0,
about −D where there is only noise, so a rule in log σ has little left to err in; in σ it would fall like −D/σ, and
any rule of few steps would make every point look more likely than it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgm_engine.evaluation.flow import checked_sigmas, directions_of, heun, log_prior, refuse_draws, runge_kutta
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.numerics import undisturbed
from sgm_engine.outputs.images import range_of
from sgm_engine.plans.schedule import Sigmas, check_sigmas

LADDER, LONGEST = 9, 1025  # levels: of the first try, and of the last
TOO_FEW = 0.01  # bits per dimension, of the steps, that a model's own levels are warned of


class Likelihood(NamedTuple):
    """log_prob [n]: nats, float64. error [n]: what the last doubling of the levels changed it by, or an eighth of what
    the one before did, if that is more. noise [n]: standard error of the trace's random signs; 0 where it is exact, NaN
    of one probe. levels [n]: of the last ladder, int64."""

    log_prob: Tensor
    error: Tensor
    noise: Tensor
    levels: Tensor


def log_likelihood(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    probes: int | None = 1,
    seed: int = 0,
    first_id: int = 0,
    sigmas: Sigmas | None = None,
    prior_mean: float | Tensor = 0.0,
    prior_std: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Natural logarithms [n], float64, of the density at x [n, …] of the model's law at its last sigma.

    model: ``model(x, level) → score``, differentiable in x. Its sigmas [L], descending, are the steps, two evaluations
        and their gradients each, by Heun's rule for x and the trapezoidal one in log σ for the trace; the error falls
        as L⁻². ``likelihood_within`` takes as many as a tolerance needs. Where they are the model's own, the first
        point is integrated over every other level too, and an error above 0.01 bits per dimension is warned of.
    probes: random sign vectors a sample, functions of (seed, first_id + its place) in the stream "user"; None takes all
        D unit vectors, which is exact and costs as many gradients. The estimate is unbiased; only the trace is
        random. prior_mean, prior_std: of a pixel at the first sigma σ_1; std None takes σ_1.
    dtype: what the model is asked in; sums are float64, whatever autocast or default dtype the caller has set, and in
        inference mode too.
    ValueError names what is wrong, FloatingPointError a score that is not finite.
    """
    with _undisturbed(x) as x:
        own = sigmas is None
        sigmas = checked_sigmas(model, sigmas)
        directions = directions_of(x, probes, seed, first_id, dtype)
        prior = log_prior(prior_mean, prior_std, sigmas)
        refuse_draws(model, x, len(sigmas) - 1, dtype)
        found = heun(model, x, sigmas, directions, prior)
        if own and len(x):
            coarse = heun(model, x[:1], sigmas, directions[:, :1], prior, every=2)
            bits = bits_per_dim((found[:, :1] - coarse).mean() / 3, x[0].numel(), 1).abs().item()
            if bits > TOO_FEW:
                warnings.warn(
                    f"sigmas: {len(sigmas)} levels are too few: their steps alone err by about {bits:.2g} bits per "
                    "dimension; likelihood_within takes as many as a tolerance needs",
                    stacklevel=2,
                )
        return found.mean(0)


def likelihood_within(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    tolerance: float = 0.01,
    probes: int | None = 1,
    seed: int = 0,
    first_id: int = 0,
    prior_mean: float | Tensor = 0.0,
    prior_std: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Likelihood:
    """``log_likelihood`` between the model's first and last sigma, with levels doubled until the figure holds still.

    model: what ``at_sigmas`` can condition between its levels (a model of as_score that is told σ, a family's, NCSN).
    Runge and Kutta's fourth-order steps in log σ, four evaluations for two intervals: 9 levels, then 17, 33, … For each
    point by itself, until its error is below ``tolerance`` bits per dimension; other arguments as above. Points that
    1,025 levels do not bring so far are warned of, and their error says by how much.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    with _undisturbed(x) as x:
        ends = checked_sigmas(model, None)[[0, -1]]
        directions = directions_of(x, probes, seed, first_id, dtype)
        prior = log_prior(prior_mean, prior_std, ends)
        n, size = len(x), x.shape[1:].numel()
        value, before = x.new_zeros(len(directions), n), x.new_full((n,), math.inf)
        error = before.clone()
        levels, todo, count = torch.zeros(n, dtype=torch.int64), torch.arange(n), LADDER
        while len(todo) and count <= LONGEST:
            sigmas = np.geomspace(*ends, count)
            at = at_sigmas(model, sigmas)
            if count == LADDER:
                refuse_draws(at, x, count - 1, dtype)
            found = runge_kutta(at, x[todo], sigmas, directions[:, todo], prior)
            if count > LADDER:
                change = (found - value[:, todo]).mean(0).abs()
                error[todo], before[todo] = torch.maximum(change, before[todo] / 8), change
            value[:, todo], levels[todo] = found, count
            todo = todo[(error[todo] > tolerance * size * math.log(2)).cpu()]
            count = 2 * count - 1
        if len(todo):
            warnings.warn(
                f"{len(todo)} of {n} points are not within {tolerance:g} bits per dimension after {LONGEST} levels: "
                "see their error",
                stacklevel=2,
            )
        several = len(directions) > 1
        noise = value.std(0) / len(directions) ** 0.5 if several else torch.full_like(error, math.nan)
        return Likelihood(value.mean(0), error, torch.zeros_like(error) if probes is None else noise, levels)


@contextmanager
def _undisturbed(x: Tensor) -> Iterator[Tensor]:
    """Where a density is computed, and x [n, …] there, float64."""
    with undisturbed(), torch.enable_grad():
        if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor of floats [n, D] or [n, C, H, W], got {got}")
        x = x.clone() if x.is_inference() else x
        with torch.no_grad():
            yield x.detach().double()


class FlowDensity:
    """``log_prob(x)`` of a score model, for pixels x in [0, 1], by ``likelihood_within`` to ``tolerance``.

    Chains end in N(mean, σ_1² + std²) of the model's law of the data, where it has one. errors: bits per dimension, of
    each image so far; levels: of its last ladder. The k-th image meets the random signs of id k.
    """

    def __init__(self, model, tolerance: float = 0.01):
        self.model, self.tolerance = model, tolerance
        self.errors: list[float] = []
        self.levels: list[int] = []

    def log_prob(self, x: Tensor) -> Tensor:
        low, high = range_of(self.model)
        law, first = getattr(self.model, "law", None), float(check_sigmas(self.model.sigmas)[0])
        mean, std = ((low + high) / 2, first) if law is None else (law.mean, math.hypot(first, law.std))
        found = likelihood_within(
            self.model,
            low + (high - low) * x,
            self.tolerance,
            first_id=len(self.errors),
            prior_mean=torch.tensor(np.array(mean)),
            prior_std=std,
        )
        size = x.shape[1:].numel()
        self.errors += bits_per_dim(-found.error, size, 1).tolist()
        self.levels += found.levels.tolist()
        return found.log_prob + size * math.log(high - low)


def bits_per_dim(log_prob: Tensor, dim: int, bins: float = 256) -> Tensor:
    """Bits a dimension of an image of grey levels: −log p/(d·ln 2) + log₂ bins, like log_prob (nats).

    bins: grey levels in a unit of x: 256 for pixels in [0, 1], 128 for [−1, 1] (log₂ 128 = 7).
    """
    return -log_prob / (dim * math.log(2)) + math.log2(bins)


@torch.no_grad()
def image_bits(
    log_prob: Callable[[Tensor], Tensor],
    images: np.ndarray,
    dequantised: bool = True,
    seed: int = 0,
    batch: int = 100,
    device=None,
) -> Tensor:
    """Bits per dimension of uint8 images [N, C, H, W] under a density of pixels in [0, 1], float64 [N].

    log_prob: x float32 [b, C, H, W] → nats [b], on ``device``. dequantised: at (image + U)/256, U uniform, whose mean
    bounds the bits of the discrete image from above; else at the middle of the pixel's interval, (image + ½)/256. U of
    image i is the noise of training sample i under ``seed`` (training.keys), whatever the batch.
    """
    from sgm_engine.data.images import dequantise
    from sgm_engine.keys import Key

    found = [torch.empty(0, dtype=torch.float64)]
    for first in range(0, len(images), batch):
        x = torch.from_numpy(np.array(images[first : first + batch])).to(device)
        u = torch.full(x.shape, 0.5, device=device)
        if dequantised:
            u = Key(seed, torch.arange(first, first + len(x), device=device)).uniform(u)
        log_p = log_prob(dequantise(x, u))
        if log_p.shape != (len(x),):
            raise ValueError(f"log_prob must return one number an image, [{len(x)}], got {list(log_p.shape)}")
        found.append(bits_per_dim(log_p.double(), x[0].numel()).cpu())
    return torch.cat(found)
