"""Langevin dynamics that accept or refuse each step: the Metropolis-adjusted Langevin algorithm.

A Langevin row proposes x' = x + b·s(x) + √(2b)·z, and x' is taken with probability

    min(1, q(x')·exp(−‖x − x' − b·s(x')‖²/4b) / (q(x)·exp(−‖x' − x − b·s(x)‖²/4b)))       (Roberts & Tweedie 1996)

so that q_σ is what the chain keeps, at any step size. A score alone cannot say that ratio; a CDM can, and so can a
density of your own. Plans are the engine's: the same rows, the same noise, the same start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.checks import check_chains, check_shape
from sgm_engine.executors.slots import SAMPLE_STREAM, started
from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM
from sgm_engine.keys import as_int64, to_device
from sgm_engine.models.energy import value_and_gradient
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import Sigmas, check_sigmas


class Density(nn.Module):
    """A density of one's own as a model with energies: log_prob(x [N, C, H, W], sigma [N]) → [N], differentiable.

    sigmas [L], descending: the levels that a plan may use; shape (C, H, W). forward(x, level) is its score.
    """

    def __init__(self, log_prob: Callable[[Tensor, Tensor], Tensor], sigmas: Sigmas, shape: tuple[int, int, int]):
        super().__init__()
        self.log_prob, self.shape = log_prob, check_shape(shape)
        self.register_buffer("sigmas", torch.tensor(check_sigmas(sigmas), dtype=torch.float32), persistent=False)

    def log_q_and_score(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable itself where gradients are enabled."""
        return value_and_gradient(lambda x: self._checked(x, self.sigmas[level]), x)

    def _checked(self, x: Tensor, sigma: Tensor) -> Tensor:
        value = self.log_prob(x, sigma)
        if value.shape != x.shape[:1]:
            raise ValueError(f"log_prob must return one value a sample, [{len(x)}], got {list(value.shape)}")
        return value

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.log_q_and_score(x, level)[1]

    def at_sigmas(self, sigmas: Sigmas) -> Density:
        return Density(self.log_prob, sigmas, self.shape).to(self.sigmas.device)


@dataclass(frozen=True)
class Chains:
    """What ``mala`` returns. x: float32 [n, C, H, W]. acceptance: float64 [R], the share of the n proposals that a row
    of the plan took; NaN for rows without noise, which propose nothing."""

    x: Tensor
    acceptance: np.ndarray


@torch.no_grad()
def mala(model, plan: Plan, n: int, seed: int = 0, first_id: int = 0, init: Tensor | None = None) -> Chains:
    """n chains of ``plan``, whose rows are Langevin steps (a = 1, c² = 2b) or have no noise, Metropolis-adjusted.

    model: a CDM, a Density, a model of as_score(kind="energy"), or anything with ``log_q_and_score(x, level)`` →
    (log q_σ(x) [n], score), ``sigmas``, ``shape`` and a device like its ``sigmas``. One evaluation a row, and one more
    at each change of level. All n at once. Proposals meet the noise that Engine.sample(n, seed, plan, first_id) would
    draw; whether they are taken is decided by the uniform of stream "accept", draw k in row k = 1, 2, … ValueError
    names a row that is no such step, and a sample that begins a level where log q or its gradient is not finite: such
    a chain could never move.
    """
    if not hasattr(model, "log_q_and_score"):
        raise TypeError(
            f"{type(model).__name__} has no energies (log_q_and_score): pass a CDM, a Density, or a model of "
            "as_score(kind='energy')"
        )
    _check(plan, model.sigmas)
    device, shape = model.sigmas.device, check_shape(model.shape)
    chains = check_chains(n, seed, first_id, init, shape, device)
    ids = to_device([sample_id for sample_id, _, _ in chains], device)
    seeds = to_device([as_int64(own) for _, own, _ in chains], device)
    x = torch.empty(n, *shape, device=device)
    if init is None:
        ops.noise_fill_(x, seeds, ids, 0, SAMPLE_STREAM, plan.start)
        started(x, plan)
    elif n:
        torch.stack([own for _, _, own in chains], out=x)
    table = torch.tensor(np.stack([plan.a, plan.b, plan.c, plan.d], 1), dtype=torch.float32, device=device)
    draw = torch.arange(1, plan.nfe + 1, dtype=torch.int32, device=device)
    u = torch.empty(n, 1, 1, 1, device=device)
    acceptance, level_before = np.full(plan.nfe, np.nan), None
    for k in range(plan.nfe):
        level = torch.full((n,), int(plan.level[k]), device=device)
        if plan.level[k] != level_before:
            value, score = model.log_q_and_score(x, level)
            level_before = plan.level[k]
            _refuse_outside(value, score, ids, int(plan.level[k]))
        proposal = ops.langevin_update(x, score, table, draw, torch.full_like(level, k), seeds, ids)
        if plan.c[k] == 0:
            x, level_before = proposal, None
            continue
        new_value, new_score = model.log_q_and_score(proposal, level)
        b, step = float(plan.b[k]), (proposal - x).double()
        forth, back = step - b * score.double(), -step - b * new_score.double()
        ratio = (new_value.double() - value.double()) + (_square(forth) - _square(back)) / (4 * b)
        ops.noise_fill_(u, seeds, ids, k + 1, STREAM["accept"], "uniform")
        taken = u.flatten().double().log() < ratio  # NaN is refused
        acceptance[k] = taken.double().mean().item() if n else np.nan
        column = taken[:, None, None, None]
        x, score = torch.where(column, proposal, x), torch.where(column, new_score, score)
        value = torch.where(taken, new_value, value)
    return Chains(x, acceptance)


def _check(plan: Plan, sigmas: Tensor) -> None:
    known = check_sigmas(sigmas)
    for row in range(plan.nfe):
        langevin = np.isclose(plan.c[row] ** 2, 2 * plan.b[row], rtol=1e-9) and plan.a[row] == 1
        history = plan.d[row] or plan.e[row] or plan.f[row] or plan.adaptive[row]
        if history or not (langevin or plan.c[row] == 0):
            raise ValueError(
                f"plan row {row} is no Langevin step (a = {plan.a[row]:g}, b = {plan.b[row]:g}, c = {plan.c[row]:g}; "
                "a must be 1 and c² = 2b): take annealed_langevin"
            )
        if plan.level[row] >= len(known) or not np.isclose(known[plan.level[row]], plan.sigma[row], rtol=1e-4):
            raise ValueError(
                f"plan row {row} has sigma {plan.sigma[row]:g} at level {plan.level[row]}, which is not the model's: "
                "make the plan from model.sigmas"
            )


def _refuse_outside(value: Tensor, score: Tensor, ids: Tensor, level: int) -> None:
    lost = ~(value.isfinite() & score.flatten(1).isfinite().all(1))
    if lost.any():
        raise ValueError(
            f"{int(lost.sum())} of {len(ids)} chains, such as sample {int(ids[lost][0])}, begin level {level} where "
            "log q or its gradient is not finite, and could never move: start them where the density is (init=, or the "
            "plan's start_scale and start_shift)"
        )


def _square(v: Tensor) -> Tensor:
    return v.flatten(1).square().sum(1)
