"""A sampler for azula's denoisers, with the calls of azula.sample.Sampler.

    from sgm_engine.integrations.azula import ALDSampler
    sampler = ALDSampler(denoiser, steps=64)
    x0 = sampler(sampler.init((16, 3, 64, 64)))

denoiser(x_t [B, ...], t, **kwargs).mean → denoised, and denoiser.schedule(t) → (α_t, σ_t), with x_t = α_t·x + σ_t·z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sgm_engine.integrations.foreign import langevin, normal, run, seeds
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import check_sigmas


class PlanSampler:
    """``plan(sigmas [steps], σ_t/α_t descending) → Plan``, from t = start to t = stop, over the engine.

    start, stop, steps, silent: as azula's samplers take them; steps levels, start first. The last row of the plan takes
    x to no noise, so a result has none, where azula's keep σ_stop. seed: one integer, or one a sample; None draws one
    from torch's generator at every call.
    """

    def __init__(
        self,
        denoiser,
        plan: Callable[[np.ndarray], Plan],
        start: float = 1.0,
        stop: float = 0.0,
        steps: int = 64,
        silent: bool = False,
        seed: int | Sequence[int] | None = None,
    ):
        self.denoiser, self.plan, self.silent, self.seed = denoiser, plan, silent, seed
        self.start, self.stop, self.steps = start, stop, steps

    @property
    def timesteps(self) -> Tensor:
        """float64 [steps + 1]: the times of the levels, and stop."""
        return torch.linspace(self.start, self.stop, self.steps + 1, dtype=torch.float64)

    @torch.no_grad()
    def init(self, shape: Sequence[int], mean: float | Tensor = 0.0, var: float | Tensor = 1.0, **kwargs) -> Tensor:
        """x_start ~ N(α·mean, α²·var + σ²), [B, ...]; kwargs: as of Tensor.to."""
        alpha, sigma = self._schedule(self.timesteps[:1])
        a, s, noise = alpha.item(), sigma.item(), normal(shape, seeds(self.seed, shape[0])).to(**kwargs)
        return a * mean + (a**2 * torch.as_tensor(var).to(noise) + s**2) ** 0.5 * noise

    @torch.no_grad()
    def __call__(self, x: Tensor, **kwargs) -> Tensor:
        """x [B, ...] at time start → a sample like it. kwargs go to the denoiser."""
        t = self.timesteps[:-1]
        alpha, sigma = self._schedule(t)
        sigmas = check_sigmas(sigma / alpha)
        time, scale = (v.to(x.device, torch.float32) for v in (t, alpha))

        def denoise(x: Tensor, level: Tensor) -> Tensor:  # the whole batch is at one level: azula's t is a scalar
            now, a = (v.index_select(0, level[:1]).squeeze(0) for v in (time, scale))
            return self.denoiser((a * x).to(x.dtype), now.to(x.dtype), **kwargs).mean

        start = (x / alpha[0].item()).to(x.dtype)
        return run(self.denoiser, denoise, start, self.plan(sigmas), sigmas, self.seed, "level", None, not self.silent)

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ, float64 [len(t)]."""
        alpha, sigma = self.denoiser.schedule(t)
        return alpha.expand_as(t).double().cpu(), sigma.expand_as(t).double().cpu()


class ALDSampler(PlanSampler):
    """Annealed Langevin dynamics (arXiv 1907.05600): ``steps_per_level`` steps of size α = step·σ² at each level."""

    def __init__(self, denoiser, steps_per_level: int = 5, step: float = 0.1, **kwargs):
        def plan(sigmas: np.ndarray) -> Plan:
            return langevin(sigmas, steps_per_level, step)

        super().__init__(denoiser, plan, **kwargs)
