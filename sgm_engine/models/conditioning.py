"""``at_sigmas(model, sigmas)``: a model as it would be if it had been trained at other sigmas.

A discrete model knows L levels; a plan may want sigmas between them. What follows runs on every executor, because the
result is an ordinary model whose levels are the plan's sigmas:

    plan = heun(karras(1, 0.01, 18))
    Engine(at_sigmas(model, plan.sigmas)).sample(64, plan=plan)
"""

from __future__ import annotations

import copy
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.models.blocks import ConditionalInstanceNormPlus
from sgm_engine.models.ncsn import RefineNet
from sgm_engine.plans.front import OWN
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import Sigmas, check_sigmas, nearest_level


def at_sigmas(model: nn.Module, sigmas: Sigmas) -> nn.Module:
    """``model`` with ``sigmas`` [L'], descending, as its levels. Weights are shared, except what depends on the level.

    - a model of ``as_score`` that is told σ, in whatever form, is asked at those σ: exact.
    - NCSNv2: one network for all levels, its output divided by σ: exact.
    - NCSN: the rows (γ, α, β) of each norm are interpolated linearly in log σ between the two nearest levels: one
      evaluation, exact at trained levels, an approximation between them, refused outside. They are copies: call
      at_sigmas again after training.
    Anything else that has a method ``at_sigmas(sigmas)`` is asked; ValueError where it cannot be had.
    """
    sigmas = check_sigmas(sigmas)
    if hasattr(model, "at_sigmas"):
        return model.at_sigmas(sigmas)
    if not isinstance(model, RefineNet):
        raise ValueError(
            f"{type(model).__name__} cannot be asked between its levels: take plan.on_levels(model.sigmas), or wrap it "
            "with as_score if it is told sigma"
        )
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    trained = check_sigmas(model.sigmas)
    norms = [m for m in model.modules() if isinstance(m, ConditionalInstanceNormPlus)]
    if norms:
        rows, weight = _between(sigmas, trained)
        for norm in norms:
            table = norm.embed.weight.detach()
            memo[id(norm.embed.weight)] = nn.Parameter(_lerp(table, rows, weight), requires_grad=False)
    memo[id(model.sigmas)] = torch.tensor(sigmas, dtype=torch.float32, device=model.sigmas.device)
    other = copy.deepcopy(model, memo)
    for norm in other.modules():
        if isinstance(norm, ConditionalInstanceNormPlus):
            norm.embed.num_embeddings = len(sigmas)
    return other


def conditioned(model, plan: Plan) -> tuple[object, Plan]:
    """The model and the plan such that they fit: as they are where the plan's sigmas are levels of the model, else the
    model conditioned between its levels (at_sigmas; ValueError if it cannot be)."""
    sigmas = check_sigmas(model.sigmas)
    if np.abs(np.log(plan.sigma / sigmas[nearest_level(plan.sigma, sigmas)])).max() < OWN:
        return model, plan.on_levels(sigmas)
    return at_sigmas(model, plan.sigmas), plan.on_levels(plan.sigmas)


def _between(sigmas: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each σ the level above it and the weight of the next one, linear in log σ."""
    outside = np.flatnonzero((sigmas > trained[0] * (1 + 1e-6)) | (sigmas < trained[-1] * (1 - 1e-6)))
    if len(outside):
        raise ValueError(
            f"sigmas[{outside[0]}] = {sigmas[outside[0]]:g} lies outside the model's levels, {trained[0]:g} to "
            f"{trained[-1]:g}: there is nothing to interpolate"
        )
    place = np.interp(-np.log(sigmas), -np.log(trained), np.arange(len(trained)))
    # A level itself, in whatever rounding it comes, is exact.
    place = np.where(np.abs(place - place.round()) < 1e-5, place.round(), place)
    rows = np.minimum(place.astype(np.int64), max(len(trained) - 2, 0))
    return rows, place - rows


def _lerp(table: Tensor, rows: np.ndarray, weight: np.ndarray) -> Tensor:
    index = torch.from_numpy(rows).to(table.device)
    after = (index + 1).clamp(max=len(table) - 1)
    w = torch.tensor(weight, dtype=table.dtype, device=table.device)[:, None]
    return (1 - w) * table[index] + w * table[after]
