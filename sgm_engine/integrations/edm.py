"""Samplers for networks of EDM (arXiv 2206.00364) and EDM2 (arXiv 2312.02696), with the signatures of their programs.

    from sgm_engine.integrations.edm import sampler_fn
    images = sampler_fn(net, latents, class_labels, randn_like=rnd.randn_like, num_steps=64)             # EDM
    images = sampler_fn(net=net, noise=noise, labels=labels, gnet=gnet, randn_like=rnd.randn_like)       # EDM2

net(x [B, C, H, W], sigma [B], labels) → denoised. latents: unit normal [B, C, H, W]; the result is like them. Where
``rnd`` holds one generator a sample (``rnd.generators``, as StackedRandomGenerator does), each sample has a seed of its
own, and comes out the same in any batch whose size is the same. The sampler is annealed Langevin dynamics on EDM's
sigmas; ``functools.partial(sampler_fn, plan=…)`` takes any other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sgm_engine.integrations.foreign import langevin, run, seeds
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import check_sigmas, karras


def sampler_fn(
    net,
    latents: Tensor | None = None,
    class_labels: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    labels: Tensor | None = None,
    gnet=None,
    guidance: float = 1.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 64,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    steps_per_level: int = 5,
    step: float = 0.1,
    plan: Callable[[np.ndarray], Plan] | None = None,
) -> Tensor:
    """latents or noise [B, C, H, W] → images, of their dtype. class_labels and labels are the same thing.

    num_steps sigmas from sigma_max down to sigma_min, within net.sigma_min and net.sigma_max, spaced by ``rho``;
    steps_per_level steps of size α = step·σ² at each, or ``plan(sigmas)``. guidance, gnet: EDM2's; the denoised image
    is gnet's + guidance·(net's − gnet's).
    """
    if (latents is None) == (noise is None):
        raise ValueError("latents (EDM) or noise (EDM2): pass one of them")
    if class_labels is not None and labels is not None:
        raise ValueError("class_labels (EDM) or labels (EDM2): pass one of them")
    latents = noise if latents is None else latents
    labels = class_labels if labels is None else labels
    if gnet is None and guidance != 1:
        raise ValueError(f"guidance = {guidance} needs gnet, the network to guide by")
    sigmas = _sigmas(net, num_steps, sigma_min, sigma_max, rho)
    table = plan(sigmas) if plan else langevin(sigmas, steps_per_level, step)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        found = net(x, sigma, labels)
        return found if guidance == 1 else torch.lerp(gnet(x, sigma, labels).to(found), found, guidance)

    return run(net, denoise, latents * sigmas[0], table, sigmas, _seeds(randn_like, len(latents)))


def _sigmas(net, steps: int, low: float, high: float, rho: float) -> np.ndarray:
    """arXiv 2206.00364, eq. 5, each rounded to one that ``net`` knows."""
    low, high = max(low, float(getattr(net, "sigma_min", 0))), min(high, float(getattr(net, "sigma_max", np.inf)))
    sigmas = karras(high, low, steps, rho)
    rounded = getattr(net, "round_sigma", torch.as_tensor)(torch.as_tensor(sigmas))
    return check_sigmas(rounded)


def _seeds(randn_like, n: int) -> int | list[int]:
    if randn_like is torch.randn_like:
        return seeds(None, n)
    generators = getattr(getattr(randn_like, "__self__", None), "generators", None)
    if generators is None:
        raise ValueError(
            "randn_like must be torch.randn_like, or a method of an object with .generators, one torch.Generator a "
            f"sample; got {randn_like!r}: the engine makes its own noise and takes only seeds from there"
        )
    return seeds(None, n, list(generators))
