"""What defines a score network of this package, as one validated, serialisable record."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

from torch import nn

from sgm_engine.outputs.images import UNIT, Range, check_range
from sgm_engine.plans.schedule import check_sigmas

MAX_LEVELS = 100_000
PLAN_VALUES = (bool, int, float, str)
ARCHITECTURES: dict[str, type[nn.Module]] = {}  # by name; the modules that hold the networks enter them


def architecture(network: type[nn.Module]) -> type[nn.Module]:
    """Enter ``network`` among ARCHITECTURES: a decorator."""
    ARCHITECTURES[network.__name__] = network
    return network


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and noise levels of a network, and (optionally) the plan that it was published with.

    architecture: "NCSN", "NCSNv2", "NCSNv2Deeper" or "NCSNv2Deepest". channels, image_size [pixels], ngf: ≥ 1.
    sigmas: noise standard deviations in units of x, strictly descending. divide_by_sigma: the output is divided by
    σ(level). plan: "name" of a function of sgm_engine.plans.plan (default annealed_langevin) and its keyword arguments.
    data_range: (low, high) of what it was trained on, and of its samples.
    Raises ValueError that names the field and its value.
    """

    architecture: str
    channels: int
    image_size: int
    ngf: int
    sigmas: tuple[float, ...]
    divide_by_sigma: bool
    plan: Mapping[str, bool | int | float | str] | None = None
    data_range: Range = UNIT

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        divisor = ARCHITECTURES[self.architecture].size_divisor()
        for field, limit in (("channels", 1024), ("image_size", 8192), ("ngf", 8192)):
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{field} must be an integer between 1 and {limit}, got {value!r}")
        if self.image_size % divisor:
            raise ValueError(f"image_size of {self.architecture} must divide by {divisor}, got {self.image_size}")
        object.__setattr__(self, "sigmas", _check_sigmas(self.sigmas))
        if type(self.divide_by_sigma) is not bool:
            raise ValueError(f"divide_by_sigma must be true or false, got {self.divide_by_sigma!r}")
        if not self.divide_by_sigma and self.architecture != "NCSN":
            raise ValueError(f"divide_by_sigma must be true for {self.architecture}, got {self.divide_by_sigma!r}")
        if self.plan is not None:
            object.__setattr__(self, "plan", _check_plan(self.plan))
        object.__setattr__(self, "data_range", check_range(self.data_range))

    def build(self) -> nn.Module:
        """The network with random weights, on torch's current default device."""
        kwargs = {"divide_by_sigma": self.divide_by_sigma} if self.architecture == "NCSN" else {}
        model = ARCHITECTURES[self.architecture](
            self.sigmas, channels=self.channels, ngf=self.ngf, image_size=self.image_size, **kwargs
        )
        model.plan, model.data_range = self.plan and dict(self.plan), self.data_range
        return model

    def to_json(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.plan is None:
            del fields["plan"]
        else:
            fields["plan"] = dict(self.plan)
        if self.data_range == UNIT:
            del fields["data_range"]
        return json.dumps(fields)

    @classmethod
    def from_dict(cls, fields: Mapping) -> ModelConfig:
        """Every field by name, "plan" and "data_range" optional; unknown and missing names raise ValueError."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"config must be an object with named fields, got {type(fields).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(k) for k in fields.keys() - known):
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}")
        if missing := sorted(known - {"plan", "data_range"} - fields.keys()):
            raise ValueError(f"config lacks fields: {', '.join(missing)}")
        return cls(**fields)


def _check_sigmas(sigmas) -> tuple[float, ...]:
    if isinstance(sigmas, (str, bytes, Mapping)) or not 1 <= len(sigmas) <= MAX_LEVELS:
        raise ValueError(f"sigmas must be a list of 1 to {MAX_LEVELS} numbers, got {str(sigmas)[:40]!r}")
    if any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in sigmas):
        raise ValueError("sigmas must hold numbers only")
    return tuple(check_sigmas(sigmas).tolist())


def _check_plan(plan) -> Mapping[str, bool | int | float | str]:
    if not isinstance(plan, Mapping):
        raise ValueError(f"plan must be an object with named scalars, got {type(plan).__name__}")
    for key, value in plan.items():
        if not isinstance(key, str) or type(value) not in PLAN_VALUES:
            raise ValueError(f"plan[{key!r}] must be a number, a string, true or false, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"plan[{key!r}] must be finite, got {value!r}")
    return dict(plan)
