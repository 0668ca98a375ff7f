"""What a network of a diffusion family is told and given at noise σ, and what its output means. One function a scheme.

y = data + σ·noise in the range that the network was trained in. With F the network:

    score of y = q·(F(c_in·y, told) − s·y),   q = c_out/σ², s = (1 − c_skip)/c_out

Each function takes sigmas [L] of y, float64, and the scheme's constants.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sgm_engine.models.score_model import KINDS


class Told(NamedTuple):
    """c_in, q and s, each [L] or a number; told [L]: int64 or float64."""

    c_in: np.ndarray | float
    q: np.ndarray | float
    s: np.ndarray | float
    told: np.ndarray


def edm(sigma: np.ndarray, sigma_data: float = 0.5) -> Told:
    """arXiv 2206.00364, table 1, last column: told ¼·ln σ."""
    return Told(*KINDS["edm"](sigma, sigma_data)[:3], np.log(sigma) / 4)


def vp(sigma: np.ndarray, beta_min: float = 0.1, beta_d: float = 19.9, scale: float = 999.0) -> Told:
    """The noise, of a variance-preserving diffusion with β(t) = β_min + β_d·t: told scale·t, t ≤ 1 (2011.13456)."""
    return Told(1 / np.sqrt(1 + sigma**2), -1 / sigma, 0.0, scale * _time(0.5 * np.log1p(sigma**2), beta_min, beta_d))


def sub_vp(sigma: np.ndarray, beta_min: float = 0.1, beta_d: float = 19.9, scale: float = 999.0) -> Told:
    """As vp, of the sub-VP diffusion: mean m·data, deviation 1 − m², so σ = (1 − m²)/m."""
    mean = (np.sqrt(sigma**2 + 4) - sigma) / 2
    return Told(mean, -1 / sigma, 0.0, scale * _time(-np.log(mean), beta_min, beta_d))


def _time(integral: np.ndarray, beta_min: float, beta_d: float) -> np.ndarray:
    """t with ¼·β_d·t² + ½·β_min·t = integral = −ln(mean)."""
    return (np.sqrt(beta_min**2 + 4 * beta_d * integral) - beta_min) / beta_d


def ve(sigma: np.ndarray) -> Told:
    """σ·score, told ln(σ/2): EDM's form of the variance-exploding networks."""
    return Told(1.0, 1 / sigma, 0.0, np.log(sigma / 2))


def score(sigma: np.ndarray) -> Told:
    """The score itself, told σ."""
    return Told(1.0, 1.0, 0.0, sigma)


def iddpm(sigma: np.ndarray, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> Told:
    """The noise, told M − 1 − j of the nearest σ_j of improved DDPM's cosine schedule (arXiv 2206.00364, table 1)."""
    nearest = np.abs(iddpm_levels(C_1, C_2, M)[None, :] - sigma[:, None]).argmin(1)
    return Told(1 / np.sqrt(1 + sigma**2), -1 / sigma, 0.0, (M - 1 - nearest).astype(np.float64))


def iddpm_levels(C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> np.ndarray:
    """u_0 > … > u_M = 0, with ᾱ_j = sin²(½π·j/(M·(C_2 + 1))): [M + 1]."""
    if type(M) is not int or not 1 < M <= 100_000 or not (0 < C_1 < 1 and 0 < C_2 < 1):
        raise ValueError(f"iddpm needs C_1 and C_2 in (0, 1) and M from 2 to 100000, got {C_1}, {C_2}, {M}")
    alpha = np.sin(0.5 * np.pi * np.arange(M + 1) / M / (C_2 + 1)) ** 2
    u = np.zeros(M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(alpha[j - 1] / alpha[j], C_1) - 1)
    return u


PREDICTIONS = {"epsilon": "vp_noise_prediction", "sample": "vp_denoiser", "v_prediction": "v_prediction"}


def ddpm(
    sigma: np.ndarray, alphas_cumprod: Sequence[float], prediction: str = "epsilon", scale: float = 1.0, steps=None
) -> Told:
    """A DDPM with these ᾱ [T]: told scale·t, between two timesteps where σ is, linear in ln σ.

    prediction: "epsilon" (the noise), "sample" (the data) or "v_prediction". steps: its sampler's spacing of them.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    trained = ddpm_levels(alphas_cumprod)
    step = np.interp(np.log(sigma), np.log(trained), np.arange(len(trained)))
    step = np.where(np.abs(step - step.round()) < 1e-3, step.round(), step)  # a level itself, in float32
    whole = scale == 1 and (step == step.round()).all()
    return Told(*KINDS[PREDICTIONS[prediction]](sigma, 0.5)[:3], step.astype(np.int64) if whole else scale * step)


def ddpm_levels(alphas_cumprod: Sequence[float]) -> np.ndarray:
    """√((1−ᾱ)/ᾱ) by timestep, ascending."""
    alphas = np.asarray(alphas_cumprod, np.float64)
    if alphas.ndim != 1 or not len(alphas) or not ((alphas > 0) & (alphas < 1)).all() or (np.diff(alphas) >= 0).any():
        raise ValueError("alphas_cumprod must descend, between 0 and 1 exclusive: a schedule of zero SNR has no last σ")
    return np.sqrt((1 - alphas) / alphas)


def spaced(count: int, n: int, steps: Mapping | None) -> np.ndarray:
    """n of ``count`` timesteps, descending, as diffusers' schedulers space them: steps {"spacing", "offset"}."""
    if not 2 <= n <= count:
        raise ValueError(f"a model of {count} timesteps takes 2 to {count} of them, got {n}")
    spacing, offset = (steps or {}).get("spacing", "leading"), (steps or {}).get("offset", 0)
    if spacing == "leading":
        found = (np.arange(n) * (count // n)).round()[::-1] + offset
    elif spacing == "trailing":
        found = np.round(np.arange(count, 0, -count / n)) - 1
    elif spacing == "linspace":
        found = np.linspace(0, count - 1, n).round()[::-1]
    else:
        raise ValueError(f"timestep_spacing must be leading, trailing or linspace, got {spacing!r}")
    return np.clip(found, 0, count - 1).astype(np.int64)


SCHEMES: dict[str, Callable[..., Told]] = {f.__name__: f for f in (edm, vp, sub_vp, ve, score, iddpm, ddpm)}
VARIANCE_PRESERVING = ("vp", "sub_vp", "ddpm", "iddpm")


def told(scheme: Mapping, sigma: np.ndarray) -> Told:
    """The row of a scheme, {"name": …, its constants}; ValueError names what is unknown."""
    options = dict(scheme)
    name = options.pop("name", None)
    if name not in SCHEMES:
        raise ValueError(f"preconditioning must be one of {', '.join(SCHEMES)}, got {name!r}")
    known = list(inspect.signature(SCHEMES[name]).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"preconditioning {name} takes {', '.join(known) or 'nothing'}, not {', '.join(unknown)}")
    return SCHEMES[name](np.asarray(sigma, np.float64), **options)
