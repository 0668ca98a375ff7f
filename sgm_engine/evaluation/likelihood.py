"""log p(x) under a score model, by its probability flow (arXiv 2011.13456, appendix D.2).

dx/dσ = −σ·score(x, σ) carries an image from the smallest sigma to the largest, where almost only noise is left:

    log p_σL(x) = log N(x(σ_1); mean, std²·I) − ∫ σ·tr ∇score(x(σ), σ) dσ     from σ_L to σ_1

by Heun's second-order steps, the trace by Skilling's and Hutchinson's estimate vᵀ∇score·v with random signs v.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.checks import MAX_ID, MAX_SEED, check_int
from sgm_engine.executors.witness import REPEATED, relative
from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM
from sgm_engine.keys import as_int64
from sgm_engine.models.score_model import checked_score
from sgm_engine.numerics import undisturbed
from sgm_engine.plans.schedule import Sigmas, check_number, check_sigmas
from sgm_engine.rewriting.altered import in_training


def log_likelihood(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    probes: int | None = 1,
    seed: int = 0,
    first_id: int = 0,
    sigmas: Sigmas | None = None,
    prior_mean: float = 0.0,
    prior_std: float | None = None,
) -> Tensor:
    """Natural logarithms [n], float64, of the density at x [n, C, H, W] of the model's law at its last sigma.

    model: ``model(x, level) → score``, differentiable in x. Its sigmas [L], descending, are the steps, two evaluations
        and their gradients each; ``at_sigmas(model, karras(σ_1, σ_L, 50))`` makes them any others. The error falls as
        L⁻².
    probes: random sign vectors a sample, functions of (seed, first_id + its place) in the stream "user"; None takes all
        C·H·W unit vectors, which is exact and costs as many gradients. The estimate is unbiased; only the trace is
        random. prior_mean, prior_std: of a pixel at the first sigma σ_1; std None takes σ_1.
    Computed in float32 and float64, whatever autocast or default dtype the caller has set, and in inference mode too.
    ValueError names what is wrong, FloatingPointError a score that is not finite.
    """
    with undisturbed(), torch.enable_grad():
        x = x.clone() if isinstance(x, Tensor) and x.is_inference() else x
        return _integrated(model, x, probes, seed, first_id, sigmas, prior_mean, prior_std)


@torch.no_grad()
def _integrated(model, x, probes, seed, first_id, sigmas: Sigmas, prior_mean, prior_std) -> Tensor:
    sigmas = getattr(model, "sigmas", None) if sigmas is None else sigmas
    if sigmas is None:
        raise ValueError("sigmas: the model has none of its own, so pass its noise levels, descending")
    sigmas = check_sigmas(sigmas)
    if len(sigmas) < 2:
        raise ValueError(f"sigmas must be at least 2 levels to integrate between, got {len(sigmas)}")
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor of floats [n, C, H, W], got {got}")
    directions = _unit_vectors(x) if probes is None else _signs(x, check_int("probes", probes, 1), seed, first_id)
    std = check_number("prior_std", sigmas[0] if prior_std is None else prior_std)
    if not 0 < std < np.inf:
        raise ValueError(f"prior_std must be positive and finite, got {std}")

    x, integral = x.detach().double(), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if len(x):
        _refuse_draws(model, x, len(sigmas) - 1)
    for level in range(len(sigmas) - 1, 0, -1):
        low, high = sigmas[level], sigmas[level - 1]
        score, trace = _score_and_trace(model, x, level, directions)
        ahead, ahead_trace = _score_and_trace(model, x - (high - low) * low * score, level - 1, directions)
        x = x - (high - low) / 2 * (low * score + high * ahead)
        integral = integral + (high - low) / 2 * (low * trace + high * ahead_trace)
    squared = ((x - prior_mean) / std).square().flatten(1).sum(1)
    return -squared / 2 - x.shape[1:].numel() * np.log(std * np.sqrt(2 * np.pi)) - integral


def _score_and_trace(model, x: Tensor, level: int, directions: Tensor) -> tuple[Tensor, Tensor]:
    """score(x) and the mean over directions [k, n, C, H, W] of vᵀ∇score·v [n], both float64."""
    with torch.enable_grad():
        point = x.float().requires_grad_()
        score = checked_score(model(point * 1, _levels(x, level)), point)  # * 1: a model may write to its input
        if not score.requires_grad:
            raise ValueError(
                "model must be differentiable in x, and its score has no gradient: no_grad or detach in it?"
            )
        trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for i, v in enumerate(directions):
            (product,) = torch.autograd.grad(score, point, v, retain_graph=i + 1 < len(directions))
            trace += (product * v).flatten(1).double().sum(1) / len(directions)
    score = score.detach().double()
    if not (score.isfinite().all() and trace.isfinite().all()):
        raise FloatingPointError(f"the score or its gradient is not finite at level {level}")
    return score, trace


def _levels(x: Tensor, level: int) -> Tensor:
    return torch.full((len(x),), level, dtype=torch.int64, device=x.device)


def _refuse_draws(model, x: Tensor, level: int) -> None:
    """ValueError unless two calls agree: a density needs one score, and of the very image."""
    if isinstance(model, nn.Module) and (name := in_training(model)):
        raise ValueError(f"model: {name} is in training mode and draws or learns there: call model.eval() first")
    first, second = (checked_score(model(x[:n].float().clone(), _levels(x[:n], level)), x[:n]) for n in (1, len(x)))
    if (difference := relative(second[:1].double(), first.double())) > REPEATED["float32"]:
        raise ValueError(
            f"model must be a function of x and level, but two calls with one image differ by {difference:.1e}"
        )


def _signs(x: Tensor, probes: int, seed: int, first_id: int) -> Tensor:
    """float32 [probes, n, C, H, W] of −1 and 1."""
    seed = check_int("seed", seed, 0, MAX_SEED)
    first_id = check_int("first_id", first_id, 0, MAX_ID + 1 - len(x))
    ids = torch.arange(first_id, first_id + len(x), device=x.device)
    seeds = torch.full_like(ids, as_int64(seed))
    out = torch.empty(probes, len(x), 1, 1, x.shape[1:].numel(), dtype=torch.float32, device=x.device)
    for draw, one in enumerate(out):
        ops.noise_fill_(one, seeds, ids, draw, STREAM["user"], "uniform")
    return (2 * (out >= 0.5).float() - 1).view(probes, *x.shape)


def _unit_vectors(x: Tensor) -> Tensor:
    """float32 [D, n, C, H, W] whose mean of vᵀ∇score·v is the trace: unit vectors times √D."""
    size = x.shape[1:].numel()
    eye = torch.eye(size, dtype=torch.float32, device=x.device) * size**0.5
    return eye.view(size, 1, *x.shape[1:]).expand(size, *x.shape)


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
