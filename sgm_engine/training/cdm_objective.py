"""Training a classification diffusion model (arXiv 2402.10095, eq. 10): cross entropy and denoising in one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sgm_engine.keys import Key
from sgm_engine.models.cdm.model import CDM, OfClasses


def cdm(
    model: CDM,
    x: Tensor,
    levels: Tensor,
    key: Key,
    labels: Tensor | None = None,
    *,
    ce_weight: float = 0.001,
    mse_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """ce_weight·CE + mse_weight·mean((ε̂ − ε)²), ε̂ = −noise_t·∇ log p_t(u) differentiated through (create_graph).

    x: data [N, …] in the model's own units. levels: classes t in 0 … T + 1, int64 [N]. labels: int64 [N], where the
    network has any. The mean is over a sample's elements; CE in nats. A weight of 0 leaves its term, and what it costs,
    out. ε = draw 0.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if ce_weight < 0 or mse_weight < 0 or ce_weight + mse_weight == 0:
        raise ValueError(f"weights must be >= 0 and not both 0, got ce {ce_weight} and mse {mse_weight}")
    u, noise = _noisy(model, x, levels, key)
    if mse_weight:
        found, logits = model.noise_pred(u, levels, create_graph=True, labels=labels)
        loss = mse_weight * (found - noise).square().flatten(1).mean(1)
    else:
        logits, loss = model.logits(u, labels), 0.0
    if ce_weight:
        loss = loss + ce_weight * F.cross_entropy(logits, levels, reduction="none")
    return loss.mean() if reduction == "mean" else loss


def ddm(
    model: OfClasses, x: Tensor, levels: Tensor, key: Key, labels: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """mean((ε̂ − ε)²) of weights read as a denoiser, with the noise of ``cdm``: DDPM's loss, of a DDM. Of a CDM of
    potentials (PotentialNet.direct) a way to good weights at half the cost of a step, which ``cdm`` then goes on from.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    u, noise = _noisy(model, x, levels, key)
    loss = (model.noise_pred_direct(u, levels, labels) - noise).square().flatten(1).mean(1)
    return loss.mean() if reduction == "mean" else loss


def _noisy(model: OfClasses, x: Tensor, levels: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """u of class t [N], and its ε."""
    if x.is_floating_point() and x.dtype.itemsize < 4:
        raise ValueError(f"x must be float32 or float64, got {x.dtype}: 16 bits are for autocast")
    noise = key.normal(x)
    signal, std = (table[levels].to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for table in (model.signal, model.noise))
    return signal * model.to_u(x) + std * noise, noise


def parts(model: CDM, x: Tensor, levels: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """(cross entropy in nats, mean squared error of ε̂) of each sample, [N] both."""
    with torch.enable_grad():
        both = [cdm(model, x, levels, key, ce_weight=c, mse_weight=1 - c, reduction="none") for c in (1.0, 0.0)]
    return both[0].detach(), both[1].detach()
