"""Samplers with k-diffusion's signature, run by the engine.

    from sgm_engine.integrations.k_diffusion import sample_ald
    x = sample_ald(model_wrap, x, sigmas, extra_args={"cond": c}, callback=print_step)

model(x [B, ...], sigma [B], **extra_args) → denoised, as every k-diffusion wrapper is; x = data + sigmas[0]·noise.
sigmas descend; a last 0 means "denoise at the end". callback gets {"x", "i", "sigma", "sigma_hat", "denoised"} of each
update, i counting network evaluations. disable: no progress bar; None: none unless stderr is a terminal. seed: one
integer, or one a sample; None draws one from torch's generator, so that torch.manual_seed decides as it does there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgm_engine.engine.progress import StepInfo
from sgm_engine.integrations.foreign import langevin, run, without_last
from sgm_engine.plans import plan as plans
from sgm_engine.plans import samplers
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import check_sigmas

Seed = int | Sequence[int] | None


def sample_ald(
    model, x: Tensor, sigmas, extra_args=None, callback=None, disable=None,
    steps_per_level: int = 5, step: float = 0.1, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """Annealed Langevin dynamics (arXiv 1907.05600): ``steps_per_level`` steps of size α = step·σ² at each sigma.

    Published: step 0.2 with 100 steps a level (NCSN), 0.062 with 5 steps on 232 levels (NCSNv2). It must be below 2.
    """

    def plan(levels):
        return langevin(levels, steps_per_level, step)

    return sample(model, x, sigmas, extra_args, callback, disable, plan, seed)


def sample_consistent(
    model, x: Tensor, sigmas, extra_args=None, callback=None, disable=None,
    steps_per_level: int = 1, eta: float = 1.0, seed: Seed = None,
) -> Tensor:  # fmt: skip
    """Consistent annealed sampling (arXiv 2009.05475), which keeps the noise in x at exactly the level's sigma."""

    def plan(levels):
        return plans.consistent_annealed(levels, steps_per_level, eta)

    return sample(model, x, sigmas, extra_args, callback, disable, plan, seed)


def sample_ancestral(
    model, x: Tensor, sigmas, extra_args=None, callback=None, disable=None, seed: Seed = None
) -> Tensor:  # fmt: skip
    """Ancestral sampling (arXiv 2011.13456, eq. 47): k-diffusion's sample_euler_ancestral, with eta = 1."""
    return sample(model, x, sigmas, extra_args, callback, disable, plans.ancestral, seed)


def sample_ddim(
    model, x: Tensor, sigmas, extra_args=None, callback=None, disable=None, seed: Seed = None
) -> Tensor:  # fmt: skip
    """DDIM, the Euler step of the probability flow: k-diffusion's sample_euler without churn. No noise is added."""
    return sample(model, x, sigmas, extra_args, callback, disable, plans.ddim, seed)


def sample_heun(
    model, x: Tensor, sigmas, extra_args=None, callback=None, disable=None, seed: Seed = None
) -> Tensor:  # fmt: skip
    """Heun's second-order steps: k-diffusion's sample_heun without churn, two evaluations a step."""
    return sample(model, x, sigmas, extra_args, callback, disable, samplers.heun, seed)


def sample_dpmpp_2m(
    model, x: Tensor, sigmas, extra_args=None, callback=None, disable=None, seed: Seed = None
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M), as k-diffusion's sample_dpmpp_2m."""
    return sample(model, x, sigmas, extra_args, callback, disable, samplers.dpm_solver_2m, seed)


def sample(
    model,
    x: Tensor,
    sigmas,
    extra_args: dict | None = None,
    callback: Callable[[dict], object] | None = None,
    disable: bool | None = None,
    plan: Callable[..., Plan] = plans.annealed_langevin,
    seed: Seed = None,
) -> Tensor:
    """Any plan: a function from sigmas [L] to a Plan whose last row denoises. The others are this with theirs."""
    sigmas = torch.as_tensor(sigmas)
    to_zero = len(sigmas) > 1 and float(sigmas[-1]) == 0
    levels = check_sigmas(sigmas[:-1] if to_zero else sigmas)
    table = plan(levels) if to_zero else without_last(plan(levels))
    extra_args = extra_args or {}

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, sigma.to(x.dtype), **extra_args)

    def tell(info: StepInfo) -> None:
        sigma = x.new_tensor(info.sigmas[0])
        before, denoised = (t.reshape(x.shape).to(x.dtype) for t in (info.before, info.denoised))
        callback({"x": before, "i": info.rows[0], "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})

    progress = sys.stderr.isatty() if disable is None else not disable
    return run(model, denoise, x, table, levels, seed, callback=tell if callback else None, progress=progress)
