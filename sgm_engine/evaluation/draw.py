"""Samples of a plan as blocks of uint8 images: what the evaluation reads, no more of them in memory than a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import Divergence
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import check_sigmas, nearest_level

OWN = 1e-5  # of log σ: what float32 makes of a level


def conditioned(model, plan: Plan) -> tuple[object, Plan]:
    """The model and the plan such that they fit: as they are where the plan's sigmas are levels of the model, else the
    model conditioned between its levels (at_sigmas; ValueError if it cannot be)."""
    sigmas = check_sigmas(model.sigmas)
    if np.abs(np.log(plan.sigma / sigmas[nearest_level(plan.sigma, sigmas)])).max() < OWN:
        return model, plan.on_levels(sigmas)
    return at_sigmas(model, plan.sigmas), plan.on_levels(plan.sigmas)


def drawn(
    engine: Engine,
    plan: Plan,
    ids: Iterable[int],
    seed: int,
    lost: list[Divergence],
    size: int = 256,
    progress: bool = False,
) -> Iterator[Tensor]:
    """uint8 [b, C, H, W], b ≤ size, in the order of ids. lost: gets the samples that diverged, which are left out."""
    block: list[Tensor] = []
    for _, x in engine.stream(ids, seed, plan, progress=progress, on_diverged=lost.append):
        block.append(x.cpu())
        if len(block) == size:
            yield _bytes(block, engine)
            block = []
    if block:
        yield _bytes(block, engine)


def _bytes(block: list[Tensor], engine: Engine) -> Tensor:
    return torch.from_numpy(engine.pictures(torch.stack(block))).permute(0, 3, 1, 2).contiguous()
