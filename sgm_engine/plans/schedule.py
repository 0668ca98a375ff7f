"""Noise schedules: descending sigmas, in units of x, as float64 [L]."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from math import erf, sqrt
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Sigmas: TypeAlias = "Sequence[float] | np.ndarray | Tensor"  # noise levels [L], descending
Shift: TypeAlias = "float | np.ndarray"  # of a start: a number, or an array [C, H, W]
STARTS = ("uniform", "normal")
MAX_ROWS = 2**22  # of a plan made by a function: 300 MB; a plan longer than that is a slip


def geometric(sigma_max: float, sigma_min: float, levels: int) -> np.ndarray:
    """``levels`` sigmas from sigma_max down to sigma_min at a constant ratio (NCSN, arXiv 1907.05600, section 4.1)."""
    _check_ends("geometric", sigma_max, sigma_min, levels)
    return check_sigmas(np.geomspace(sigma_max, sigma_min, levels))


def linear(sigma_max: float, sigma_min: float, levels: int) -> np.ndarray:
    """``levels`` sigmas from sigma_max down to sigma_min at a constant distance."""
    _check_ends("linear", sigma_max, sigma_min, levels)
    return check_sigmas(np.linspace(sigma_max, sigma_min, levels))


def karras(sigma_max: float, sigma_min: float, levels: int, rho: float = 7.0) -> np.ndarray:
    """``levels`` sigmas at a constant distance in σ^(1/rho) (EDM, arXiv 2206.00364, eq. 5); rho 1 is linear."""
    _check_ends("karras", sigma_max, sigma_min, levels)
    if not 0 < check_number("rho", rho) < np.inf:
        raise ValueError(f"karras needs a positive, finite rho, got {rho}")
    sigmas = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), levels) ** rho
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return check_sigmas(sigmas)


def cosine(sigma_max: float, sigma_min: float, levels: int) -> np.ndarray:
    """``levels`` sigmas at a constant distance in arctan σ: the cosine schedule √ᾱ = cos θ, σ = tan θ (2102.09672)."""
    _check_ends("cosine", sigma_max, sigma_min, levels)
    sigmas = np.tan(np.linspace(np.arctan(sigma_max), np.arctan(sigma_min), levels))
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return check_sigmas(sigmas)


def ncsnv2(sigma_max: float, sigma_min: float, dimension: int, overlap: float = 0.5) -> np.ndarray:
    """Geometric, with as many levels as technique 2 of NCSNv2 (arXiv 2006.09011) asks for C·H·W = ``dimension``.

    The ratio γ solves Φ(√(2D)(γ − 1) + 3γ) − Φ(√(2D)(γ − 1) − 3γ) = overlap: how much one level's shell of noise
    covers of the next one's.
    """
    _check_ends("ncsnv2", sigma_max, sigma_min, 2 if sigma_max > sigma_min else 1)
    if check_number("dimension", dimension) < 1 or not 0 < check_number("overlap", overlap) < 0.99:
        raise ValueError(f"ncsnv2 needs dimension >= 1 and overlap in (0, 0.99), got {dimension} and {overlap}")

    def covered(ratio: float) -> float:
        centre, half = sqrt(2 * dimension) * (ratio - 1), 3 * ratio
        return (erf((centre + half) / sqrt(2)) - erf((centre - half) / sqrt(2))) / 2

    low, high = 1.0, 2.0
    while covered(high) > overlap and high < 1e6:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) > overlap else (low, middle)
    levels = 1 + round(np.log(sigma_max / sigma_min) / np.log(low))
    return geometric(sigma_max, sigma_min, max(levels, 2 if sigma_max > sigma_min else 1))


SCHEDULES: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "geometric": geometric,
    "karras": karras,
    "linear": linear,
    "cosine": cosine,
}


def _check_ends(name: str, sigma_max: float, sigma_min: float, levels: int) -> None:
    if not isinstance(levels, (int, np.integer)):
        raise TypeError(f"{name} needs an integer number of levels, got {levels!r}")
    if not 0 < check_number("sigma_min", sigma_min) <= check_number("sigma_max", sigma_max) < np.inf:
        raise ValueError(f"{name} needs 0 < sigma_min <= sigma_max, got sigma_max={sigma_max}, sigma_min={sigma_min}")
    if levels < 1 or (levels == 1 and sigma_min != sigma_max):
        raise ValueError(f"{name} needs at least 2 levels between two different sigmas, got levels={levels}")


def check_number(name: str, value: object) -> float:
    """value as a float; TypeError names the argument. Arrays and tensors of no dimension are numbers, texts are not."""
    try:
        if isinstance(value, (bool, str, bytes)) or getattr(value, "ndim", 0):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number, got {reprlib.repr(value)}") from None


def check_shift(name: str, value: object) -> Shift:
    """A number as a float; an array [C, H, W], or nested lists, as read-only float64. All finite."""
    if np.ndim(value) == 0:
        value = check_number(name, value)
    else:
        value = check_column(name, value.detach().cpu().double().numpy() if hasattr(value, "detach") else value)
        if value.ndim != 3 or value.size == 0:
            raise TypeError(f"{name} must be a number, got shape {list(value.shape)}: or an array [C, H, W]")
        value.setflags(write=False)
    if not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_start(start: str, scale: float, shift: Shift) -> Shift:
    """The shift of a plan's start, an array of it read-only; ValueError for a law that is none."""
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    if not 0 <= check_number("start_scale", scale) < np.inf:
        raise ValueError(f"start_scale must be >= 0 and finite, got {scale}")
    checked = check_shift("start_shift", shift)
    return checked if isinstance(checked, np.ndarray) else shift  # a number stays what it was: plans keep their digest


def check_count(name: str, value: int, levels: int = 1) -> None:
    """value rows for each of the levels."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if value * levels > MAX_ROWS:
        raise ValueError(f"{name} must make at most {MAX_ROWS:,} evaluations a sample, got {value}: {value * levels:,}")


def check_sigmas(sigmas: Sigmas) -> np.ndarray:
    """A float64 [L] copy of ``sigmas`` (array, list or tensor on any device): positive, finite, strictly descending."""
    if hasattr(sigmas, "detach"):
        sigmas = sigmas.detach().cpu().double().numpy()  # NumPy has no bfloat16
    sigmas = check_column("sigmas", sigmas)
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas must be a non-empty vector, got shape {sigmas.shape}")
    bad = np.flatnonzero(~(np.isfinite(sigmas) & (sigmas > 0)))
    if len(bad):
        raise ValueError(f"sigmas must be positive and finite, got sigmas[{bad[0]}] = {sigmas[bad[0]]}")
    rising = np.flatnonzero(np.diff(sigmas) >= 0)
    if len(rising):
        i = rising[0]
        raise ValueError(
            f"sigmas must descend, got sigmas[{i}] = {sigmas[i]:g} before sigmas[{i + 1}] = {sigmas[i + 1]:g}; "
            "pass them from the largest noise to the smallest"
        )
    return sigmas


def check_column(name: str, values) -> np.ndarray:
    """A float64 copy; TypeError names the argument where there is something else than numbers in it."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be numbers, got {reprlib.repr(values)}") from None


def nearest_level(sigma: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """For each of ``sigma`` [R] the index (int64) into descending ``sigmas`` [L] nearest on a logarithmic scale."""
    between = np.sqrt(sigmas[:-1] * sigmas[1:])
    return np.searchsorted(-between, -np.asarray(sigma))
