"""The noise levels of a DDPM from its ᾱ, and the timesteps that a network is told at them or between them."""

from __future__ import annotations

import warnings

import numpy as np
from torch import Tensor

from sgm_engine.plans.schedule import Sigmas, check_sigmas

WIDE = 500.0  # a DDPM's noisiest σ beyond which its ᾱ says more of rounding than of data (linear β: 157)


def ddpm_levels(alphas_cumprod, timesteps, sigmas: Sigmas) -> tuple[np.ndarray, np.ndarray]:
    """σ = √((1−ᾱ)/ᾱ) and the timesteps, the noisiest first; at ``sigmas``, the timesteps between."""
    alphas = alphas_cumprod.detach().cpu().numpy() if isinstance(alphas_cumprod, Tensor) else alphas_cumprod
    alphas = np.asarray(alphas, dtype=np.float64)
    if alphas.ndim != 1 or not ((alphas > 0) & (alphas <= 1)).all() or not (alphas < 1).any():
        raise ValueError("alphas_cumprod must be a vector of values above 0 and at most 1, which has no noise")
    with np.errstate(divide="ignore"):
        own = np.sqrt((1 - alphas) / alphas)
    if sigmas is not None:
        return check_sigmas(sigmas), _steps_at(check_sigmas(sigmas), own)
    noisy = np.flatnonzero(own > 0)
    steps = noisy[::-1] if timesteps is None else np.asarray(timesteps)
    if steps.ndim != 1 or steps.dtype.kind not in "iu" or steps.min() < 0 or steps.max() >= len(alphas):
        raise ValueError(f"timesteps must be integers from 0 to {len(alphas) - 1}")
    if not (own[steps] > 0).all():
        raise ValueError(f"timesteps hold {steps[own[steps] == 0][0]}, where ᾱ is 1: without noise there is no score")
    if own[steps].max() > WIDE:
        least, most, last = alphas[steps].min(), own[steps].max(), np.searchsorted(own, WIDE) - 1
        warnings.warn(
            f"alphas_cumprod ends at {least:.2g}, so that the noisiest level is σ = {most:,.0f} of the data's scale: "
            f"pass timesteps= from {last} down to leave such levels out",
            stacklevel=3,
        )
    return own[steps], steps.astype(np.int64)


def _steps_at(sigmas: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The timesteps, whole or between, at which a DDPM's σ [T] are ``sigmas``, linear in ln σ."""
    steps = np.flatnonzero(own > 0)
    log = np.log(own[steps])
    if (np.diff(log) <= 0).any():
        raise ValueError("alphas_cumprod must descend for sigmas between its own")
    outside = (sigmas > own[-1] * (1 + 1e-6)) | (sigmas < own[steps[0]] * (1 - 1e-6))
    if outside.any():
        span = f"{own[steps[0]]:g} to {own[-1]:g}"
        raise ValueError(f"sigmas hold {sigmas[outside][0]:g}, and alphas_cumprod goes from {span}")
    told = np.interp(np.log(sigmas), log, steps)
    near = np.abs(told - told.round()) < 1e-5
    return told.round().astype(np.int64) if near.all() else np.where(near, told.round(), told)
