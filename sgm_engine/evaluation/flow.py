"""The probability flow of a score model, dx/d(log σ) = −σ²·score, from a small σ to a large one, and what density lost
on the way: ∫ σ²·tr ∇score d(log σ), the trace by given directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.checks import MAX_ID, MAX_SEED, check_int
from sgm_engine.executors.witness import REPEATED, relative
from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM
from sgm_engine.keys import as_int64
from sgm_engine.models.score_model import checked_score
from sgm_engine.plans.schedule import Sigmas, check_number, check_sigmas
from sgm_engine.rewriting.altered import in_training


def checked_sigmas(model, sigmas: Sigmas | None) -> np.ndarray:
    sigmas = getattr(model, "sigmas", None) if sigmas is None else sigmas
    if sigmas is None:
        raise ValueError("sigmas: the model has none of its own, so pass its noise levels, descending")
    sigmas = check_sigmas(sigmas)
    if len(sigmas) < 2:
        raise ValueError(f"sigmas must be at least 2 levels to integrate between, got {len(sigmas)}")
    return sigmas


def directions_of(x: Tensor, probes: int | None, seed: int, first_id: int, dtype: torch.dtype) -> Tensor:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    signs = _unit_vectors(x) if probes is None else _signs(x, check_int("probes", probes, 1), seed, first_id)
    return signs.to(dtype)


def log_prior(mean: float | Tensor, std: float | None, sigmas: np.ndarray) -> Callable[[Tensor], Tensor]:
    """log N(x; mean, std²·I) of x [n, …]."""
    std = check_number("prior_std", sigmas[0] if std is None else std)
    if not 0 < std < np.inf:
        raise ValueError(f"prior_std must be positive and finite, got {std}")

    def log_prob(x: Tensor) -> Tensor:
        squared = ((x - mean) / std).square().flatten(1).sum(1)
        return -squared / 2 - x.shape[1:].numel() * np.log(std * np.sqrt(2 * np.pi))

    return log_prob


def heun(model, x: Tensor, sigmas: np.ndarray, directions: Tensor, prior, every: int = 1) -> Tensor:
    """log p by each direction, [k, n], over every so many of the levels."""
    path = [*range(len(sigmas) - 1, 0, -every), 0]
    integral = x.new_zeros(directions.shape[:2])
    for level, after in pairwise(path):
        low, high = sigmas[level], sigmas[after]
        score, trace = _score_and_trace(model, x, level, directions)
        ahead, ahead_trace = _score_and_trace(model, x - (high - low) * low * score, after, directions)
        x = x - (high - low) / 2 * (low * score + high * ahead)
        integral = integral + math.log(high / low) / 2 * (low**2 * trace + high**2 * ahead_trace)
    return prior(x) - integral


def runge_kutta(model, x: Tensor, sigmas: np.ndarray, directions: Tensor, prior) -> Tensor:
    """The same in steps over two intervals of geometric levels, an odd number of them."""
    integral = x.new_zeros(directions.shape[:2])

    def slopes(x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        score, trace = _score_and_trace(model, x, level, directions)
        return -(sigmas[level] ** 2) * score, sigmas[level] ** 2 * trace

    for level in range(len(sigmas) - 1, 0, -2):
        h = math.log(sigmas[level - 2] / sigmas[level])
        one, trace_one = slopes(x, level)
        two, trace_two = slopes(x + h / 2 * one, level - 1)
        three, trace_three = slopes(x + h / 2 * two, level - 1)
        four, trace_four = slopes(x + h * three, level - 2)
        x = x + h / 6 * (one + 2 * two + 2 * three + four)
        integral = integral + h / 6 * (trace_one + 2 * trace_two + 2 * trace_three + trace_four)
    return prior(x) - integral


def _score_and_trace(model, x: Tensor, level: int, directions: Tensor) -> tuple[Tensor, Tensor]:
    """score(x), and vᵀ∇score·v [k, n] of directions [k, n, …], both float64; the model is asked in their dtype."""
    with torch.enable_grad():
        point = x.to(directions.dtype).requires_grad_()
        score = checked_score(model(point * 1, _levels(x, level)), point)  # * 1: a model may write to its input
        if not score.requires_grad:
            raise ValueError(
                "model must be differentiable in x, and its score has no gradient: no_grad or detach in it?"
            )
        traces = []
        for i, v in enumerate(directions):
            (product,) = torch.autograd.grad(score, point, v.to(score.dtype), retain_graph=i + 1 < len(directions))
            traces.append((product * v).flatten(1).double().sum(1))
    score, trace = score.detach().double(), torch.stack(traces)
    if not (score.isfinite().all() and trace.isfinite().all()):
        raise FloatingPointError(f"the score or its gradient is not finite at level {level}")
    return score, trace


def _levels(x: Tensor, level: int) -> Tensor:
    return torch.full((len(x),), level, dtype=torch.int64, device=x.device)


def refuse_draws(model, x: Tensor, level: int, dtype: torch.dtype) -> None:
    """ValueError unless two calls agree: a density needs one score, and of the very image."""
    if not len(x):
        return
    if isinstance(model, nn.Module) and (name := in_training(model)):
        raise ValueError(f"model: {name} is in training mode and draws or learns there: call model.eval() first")
    first, second = (checked_score(model(x[:n].to(dtype), _levels(x[:n], level)), x[:n]) for n in (1, len(x)))
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
