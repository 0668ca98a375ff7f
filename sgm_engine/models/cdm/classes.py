"""The classes of a classification diffusion model: how much noise an image of each of them holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sgm_engine.plans.schedule import check_column, check_number, check_sigmas, geometric


@dataclass(frozen=True, eq=False)
class NoiseClasses:
    """Class t of 0 … T + 1 holds u = signal_t·u₀ + noise_t·ε, ε ~ N(0, I), of data u₀.

    signal, noise: float64 [T + 2]. Class 0 is data (1, 0), class T + 1 the reference (0, σ_r): N(0, σ_r²·I), whatever
    the data. In between noise_t/signal_t rises. ValueError names the field and the value.
    """

    signal: np.ndarray
    noise: np.ndarray

    def __post_init__(self) -> None:
        for name in ("signal", "noise"):
            column = check_column(name, getattr(self, name))
            if column.ndim != 1 or len(column) < 3 or not np.isfinite(column).all() or column.min() < 0:
                raise ValueError(f"{name} must be a vector of at least 3 finite numbers >= 0, got {column}")
            column.setflags(write=False)
            object.__setattr__(self, name, column)
        if len(self.signal) != len(self.noise):
            raise ValueError(f"signal and noise must be of one length, got {len(self.signal)} and {len(self.noise)}")
        ends = [(float(self.signal[i]), float(self.noise[i])) for i in (0, -1)]
        if ends[0] != (1, 0) or ends[1][0] != 0 or ends[1][1] == 0:
            raise ValueError(f"(signal, noise) must be (1, 0) for data and (0, σ_r) for the reference, got {ends}")
        between = self.signal[1:-1]
        if between.min() == 0 or np.diff(self.noise[:-1] / self.signal[:-1]).min() <= 0:
            raise ValueError("noise/signal must rise from class 0 to class T, and signal be positive there")

    @property
    def levels(self) -> int:
        """T, the classes between data and reference: the noise levels of a score model."""
        return len(self.signal) - 2

    @property
    def sigmas(self) -> np.ndarray:
        """noise/signal of classes T … 1, descending [T]: those of u/signal, in units of u₀."""
        return (self.noise[1:-1] / self.signal[1:-1])[::-1]


def ddpm(levels: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> NoiseClasses:
    """DDPM's (arXiv 2006.11239): ᾱ_t = Π(1 − β), β linear from beta_min to beta_max; signal √ᾱ, noise √(1 − ᾱ)."""
    _check_levels(levels)
    beta_min, beta_max = check_number("beta_min", beta_min), check_number("beta_max", beta_max)
    if not 0 < beta_min <= beta_max < 1:
        raise ValueError(f"need 0 < beta_min <= beta_max < 1, got {beta_min} and {beta_max}")
    log_alpha = np.cumsum(np.log1p(-np.linspace(beta_min, beta_max, levels)))
    return _between(np.exp(log_alpha / 2), np.sqrt(-np.expm1(log_alpha)))


def uniform(levels: int = 1000) -> NoiseClasses:
    """noise √(1 − ᾱ) = t/(T + 1), signal √ᾱ (arXiv 2402.10095, "uniform")."""
    _check_levels(levels)
    noise = np.arange(1, levels + 1) / (levels + 1)
    return _between(np.sqrt(1 - noise**2), noise)


def flow(levels: int = 1000) -> NoiseClasses:
    """noise t/(T + 1), signal 1 − t/(T + 1): the straight paths of flow matching (arXiv 2402.10095, "OT")."""
    _check_levels(levels)
    noise = np.arange(1, levels + 1) / (levels + 1)
    return _between(1 - noise, noise)


def variance_preserving(sigmas) -> NoiseClasses:
    """Any sigmas [T], descending, in units of u₀: signal 1/√(1 + σ²), noise σ/√(1 + σ²)."""
    sigmas = check_sigmas(sigmas)[::-1]
    return _between(1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2))


def variance_exploding(sigmas, reference: float | None = None) -> NoiseClasses:
    """NCSN's: signal 1, noise σ; the reference N(0, reference²·I) has the std √(σ_1² + 1) unless given."""
    sigmas = check_sigmas(sigmas)
    reference = check_number("reference", np.hypot(sigmas[0], 1.0) if reference is None else reference)
    if not 0 < reference < np.inf:
        raise ValueError(f"reference must be a positive standard deviation, got {reference}")
    return _between(np.ones(len(sigmas)), sigmas[::-1], reference)


def vp_geometric(levels: int = 160, sigma_max: float = 20.0, sigma_min: float = 0.001) -> NoiseClasses:
    """``variance_preserving`` over geometric sigmas: neighbouring classes overlap alike (NCSNv2's technique 2)."""
    return variance_preserving(geometric(sigma_max, sigma_min, levels))


def ve_geometric(
    levels: int = 160, sigma_max: float = 20.0, sigma_min: float = 0.001, reference: float | None = None
) -> NoiseClasses:
    """``variance_exploding`` over geometric sigmas."""
    return variance_exploding(geometric(sigma_max, sigma_min, levels), reference)


SCHEDULES: dict[str, Callable[..., NoiseClasses]] = {
    "ddpm": ddpm,
    "uniform": uniform,
    "flow": flow,
    "vp_geometric": vp_geometric,
    "ve_geometric": ve_geometric,
}


def _between(signal: np.ndarray, noise: np.ndarray, reference: float = 1.0) -> NoiseClasses:
    return NoiseClasses(np.r_[1.0, signal, 0.0], np.r_[0.0, noise, reference])


def _check_levels(levels: int) -> None:
    if isinstance(levels, bool) or not isinstance(levels, (int, np.integer)) or levels < 1:
        raise ValueError(f"levels must be an integer >= 1, got {levels!r}")


def check_label(class_label: int | None, guidance: float, labels: int) -> tuple[int | None, float]:
    """Both as they are; ValueError names which of them a network with ``labels`` classes cannot have."""
    if class_label is not None and not (type(class_label) is int and 0 <= class_label < labels):
        held = f"0 to {labels - 1}" if labels else "none: the network has no classes"
        raise ValueError(f"class_label must be one of the network's classes, {held}; got {class_label!r}")
    guidance = check_number("guidance", guidance)
    if not np.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if guidance != 1 and class_label is None:
        raise ValueError(f"guidance must be 1 without a class_label, got {guidance:g}: name the class to draw")
    return class_label, guidance
