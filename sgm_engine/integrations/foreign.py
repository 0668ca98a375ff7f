"""What the adapters share: the engine run on a model of another library's convention, and seeds from generators."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.engine.engine import Engine
from sgm_engine.engine.progress import StepInfo
from sgm_engine.executors.slots import SAMPLE_STREAM
from sgm_engine.kernels import ops
from sgm_engine.keys import as_int64
from sgm_engine.models.score_model import as_score
from sgm_engine.plans.plan import COLUMNS, Plan, annealed_langevin
from sgm_engine.plans.schedule import check_number

Call = Callable[[Tensor, Tensor], Tensor]


class Foreign(nn.Module):
    """``call(x [B, *shape] of dtype, told [B])`` for the engine, whose states are float32 [B, C, H, W].

    model: what ``call`` calls; as an attribute it lends its parameters to the engine, which follows them.
    """

    def __init__(self, model: object, call: Call, shape: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.model, self.call, self.sample_shape, self.dtype = model, call, tuple(shape), dtype
        self.training = bool(getattr(model, "training", False))

    @property
    def shape(self) -> tuple[int, int, int]:
        """sample_shape as (C, H, W): a smaller one gets leading ones, a larger one becomes a row."""
        if len(self.sample_shape) > 3:
            return 1, 1, math.prod(self.sample_shape)
        return (*(1,) * (3 - len(self.sample_shape)), *self.sample_shape)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.call(x.reshape(-1, *self.sample_shape).to(self.dtype), told).reshape(x.shape)


def langevin(sigmas, steps_per_level: int, step: float) -> Plan:
    """annealed_langevin with α = step·σ² at every level; ValueError unless step lies between 0 and 2."""
    step = check_number("step", step)
    if not 0 < step < 2:
        raise ValueError(f"step must lie between 0 and 2, from where on x diverges, got {step:g}")
    return annealed_langevin(sigmas, steps_per_level, step * float(sigmas[-1]) ** 2)


def run(
    model: object,
    denoise: Call,
    x: Tensor,
    plan: Plan,
    sigmas,
    seed: int | Sequence[int] | None,
    told: str = "sigma",
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
) -> Tensor:
    """``plan`` from x [B, ...], data + σ₁·noise, in one batch of B: a tensor like x.

    denoise(x [B, ...] in x's dtype, sigma float32 [B] or level int64 [B]) → denoised. seed: as ``seeds`` takes it.
    """
    if not len(x):
        return x.clone()
    foreign = Foreign(model, denoise, x.shape[1:], x.dtype)
    engine = Engine(as_score(foreign, "denoiser", sigmas, condition=told), len(x), x.device)
    init = x.detach().reshape(len(x), *engine.shape)
    out = engine.sample(len(x), seeds(seed, len(x)), plan, callback=callback, progress=progress, init=init)
    return out.reshape(x.shape).to(x.dtype)


def without_last(plan: Plan) -> Plan:
    """The plan less its last row, the step from the last sigma to no noise at all."""
    if plan.nfe < 2:
        raise ValueError("sigmas must hold at least two levels, or one and a last 0")
    return dataclasses.replace(plan, **{name: getattr(plan, name)[:-1] for name in COLUMNS})


def seeds(seed: int | Sequence[int] | None, n: int, generator=None) -> int | list[int]:
    """One seed for n samples, which then differ by sample id, or n of them, one a sample.

    seed None: from ``generator``, a torch.Generator or a list of n; by default torch's own, which torch.manual_seed
    sets. A number is drawn from each, so that the next request with the same generator gets other noise.
    """
    if seed is not None:
        seed = seed.tolist() if isinstance(seed, (np.ndarray, np.integer, Tensor)) else seed
        return seed if isinstance(seed, int) else list(seed)
    if isinstance(generator, (list, tuple)):
        if len(generator) != n:
            raise ValueError(f"generator must be one torch.Generator or a list of {n}, got {len(generator)}")
        return [_draw(g) for g in generator]
    return _draw(generator)


def normal(shape: Sequence[int], seed: int | Sequence[int]) -> Tensor:
    """N(0, 1), float32 [B, ...]: draw 0 of those seeds, the noise that an engine's chains start from."""
    n, out = shape[0], torch.empty(tuple(shape))
    keys, ids = ([seed] * n, range(n)) if isinstance(seed, int) else (seed, [0] * n)
    vectors = (torch.tensor(list(v), dtype=torch.int64) for v in (map(as_int64, keys), ids))
    ops.noise_fill_(out.view(n, 1, 1, -1), *vectors, 0, SAMPLE_STREAM, "normal")
    return out


def _draw(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
