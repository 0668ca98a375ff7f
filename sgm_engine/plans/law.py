"""What a sampler has to know of the data before its first evaluation: their mean, their spread, their range.

At noise σ data of mean μ and standard deviation s are spread as μ + √(σ² + s²)·N(0, 1), nearly: chains start there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from sgm_engine.plans.schedule import check_number, check_shift

DIGITS = 3  # of a mean that ``of`` finds: beside any noise the rest is nothing


@dataclass(frozen=True, eq=False)
class DataLaw:
    """mean: of the data, in units of x, a number for all pixels or an array [C, H, W]. std: root mean square distance
    of a pixel from it. low, high: the ends of the data's range. ValueError names the field and the value.
    """

    mean: float | np.ndarray
    std: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", check_shift("mean", self.mean))
        for name in ("std", "low", "high"):
            value = check_number(name, getattr(self, name))
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            object.__setattr__(self, name, value)
        if self.std < 0:
            raise ValueError(f"std must be >= 0, got {self.std}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    @classmethod
    def of(cls, blocks: Iterable, low: float = 0.0, high: float = 1.0) -> DataLaw:
        """The law of training images, blocks of uint8 [b, C, H, W], as x in [low, high): the mean of each pixel."""
        total, squares, n = 0.0, 0.0, 0
        for block in blocks:
            x = (np.asarray(block).astype(np.float64) + 0.5) / 256  # dequantisation adds U(0, 1)/256: its middle
            total, squares, n = total + x.sum(0), squares + np.square(x).mean((1, 2, 3)).sum(), n + len(x)
        if not n:
            raise ValueError("the law of the data needs at least one image")
        variance = squares / n - np.square(total / n).mean()
        mean, std = low + (high - low) * total / n, (high - low) * math.sqrt(max(float(variance), 0.0))
        return cls(np.round(mean, DIGITS), round(std, 4), low, high)

    def start(self, sigma: float) -> dict[str, object]:
        """Where chains begin at noise ``sigma``, as options of a sampler."""
        return {"start_scale": math.hypot(sigma, self.std), "start_shift": self.mean}

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """ValueError unless the mean is that of samples of this shape."""
        if isinstance(self.mean, np.ndarray) and self.mean.shape != tuple(shape):
            raise ValueError(f"mean is that of images {list(self.mean.shape)}, and samples are {list(shape)}")

    def to_dict(self) -> dict[str, object]:
        mean = self.mean.tolist() if isinstance(self.mean, np.ndarray) else self.mean
        return {"mean": mean, "std": self.std, "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, fields: object) -> DataLaw:
        if not isinstance(fields, Mapping) or fields.keys() != {"mean", "std", "low", "high"}:
            raise ValueError(f"the data's law must have mean, std, low and high, got {fields!r:.60}")
        return cls(**fields)

    def __str__(self) -> str:
        mean = self.mean
        said = f"{mean:.4g}" if isinstance(mean, float) else f"{mean.mean():.4g}, of each pixel by itself"
        return f"mean {said}; std {self.std:.4g}; range {self.low:g} to {self.high:g}"
