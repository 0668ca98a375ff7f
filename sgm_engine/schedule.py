"""Noise schedules: descending sigmas, in units of x, as float64 [L]."""

from __future__ import annotations

import numpy as np


def geometric(sigma_max: float, sigma_min: float, levels: int) -> np.ndarray:
    """``levels`` sigmas from sigma_max down to sigma_min at a constant ratio (NCSN, arXiv 1907.05600, section 4.1)."""
    if not 0 < sigma_min <= sigma_max < np.inf:
        raise ValueError(
            f"geometric needs 0 < sigma_min <= sigma_max, got sigma_max={sigma_max}, sigma_min={sigma_min}"
        )
    if levels < 1 or (levels == 1 and sigma_min != sigma_max):
        raise ValueError(f"geometric needs at least 2 levels between two different sigmas, got levels={levels}")
    return check_sigmas(np.geomspace(sigma_max, sigma_min, levels))


def check_sigmas(sigmas) -> np.ndarray:
    """A float64 [L] copy of ``sigmas`` (array, list or tensor on any device): positive, finite, strictly descending."""
    if hasattr(sigmas, "detach"):
        sigmas = sigmas.detach().cpu().numpy()
    sigmas = np.array(sigmas, dtype=np.float64)
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


def nearest_level(sigma: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """For each of ``sigma`` [R] the index (int64) into descending ``sigmas`` [L] nearest on a logarithmic scale."""
    between = np.sqrt(sigmas[:-1] * sigmas[1:])
    return np.searchsorted(-between, -np.asarray(sigma))
