"""What defines a classification diffusion model of this package, as one validated, serialisable record."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence

from sgm_engine.models.cdm.classes import SCHEDULES, NoiseClasses
from sgm_engine.models.config import _check_plan

WHOLE = ("channels", "image_size", "width", "blocks", "patch", "levels")
MAX_BLOCKS, MAX_WIDTH = 1000, 65_536
OPTIONAL = ("plan", "schedule_options", "attention", "fourier", "features", "baseline", "patch")


@dataclasses.dataclass(frozen=True)
class CDMConfig:
    """A U-Net that tells T + 2 noise levels of images in [0, 1] apart. ValueError names the field and the value.

    width, multipliers, blocks, attention [pixels], patch, fourier, features, baseline: as networks.UNet. schedule: one
    of classes.SCHEDULES, of ``levels`` classes between data and reference, with schedule_options; it applies to
    u = 2·x − 1. plan: as in models.ModelConfig.
    """

    channels: int
    image_size: int
    width: int
    multipliers: Sequence[int]
    blocks: int
    schedule: str
    levels: int
    schedule_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    attention: Sequence[int] = ()
    patch: int = 1
    fourier: Sequence[int] = ()
    features: int | None = None
    baseline: Sequence[float] | None = None
    plan: Mapping[str, bool | int | float | str] | None = None

    architecture = "CDM"

    def __post_init__(self) -> None:
        for name in WHOLE:
            self._whole(name, getattr(self, name), 1)
        if self.features is not None:
            self._whole("features", self.features, 1)
        for name in ("multipliers", "attention", "fourier"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name} must be a list of integers, got {value!r}")
            for v in value:
                self._whole(name, v, 0 if name == "fourier" else 1)
            object.__setattr__(self, name, tuple(value))
        if not self.multipliers:
            raise ValueError("multipliers must name at least one resolution, got none")
        if self.least_tensors > 2 * MAX_BLOCKS or self.width * max(self.multipliers) > MAX_WIDTH:
            raise ValueError(
                f"blocks, multipliers and width must make at most {MAX_BLOCKS} blocks of {MAX_WIDTH} channels, got "
                f"{self.blocks} × {len(self.multipliers)} and {self.width} × {max(self.multipliers)}"
            )
        if self.image_size % self.patch:
            raise ValueError(f"image_size must divide by patch = {self.patch}, got {self.image_size}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        known = [p for p in inspect.signature(SCHEDULES[self.schedule]).parameters if p != "levels"]
        if not isinstance(self.schedule_options, Mapping) or set(self.schedule_options) - set(known):
            raise ValueError(f"schedule_options of {self.schedule}: {', '.join(known)}; got {self.schedule_options!r}")
        if self.baseline is not None:
            pair = self.baseline
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(type(v) in (int, float) for v in pair):
                raise ValueError(f"baseline must be [mean, std], got {pair!r}")
            object.__setattr__(self, "baseline", tuple(map(float, pair)))
        if self.plan is not None:
            object.__setattr__(self, "plan", _check_plan(self.plan))
        _ = self.classes  # refuses what the schedule refuses

    @property
    def classes(self) -> NoiseClasses:
        return SCHEDULES[self.schedule](self.levels, **self.schedule_options)

    @property
    def least_tensors(self) -> int:
        """Fewer tensors than a file of its weights has: two a block."""
        return 2 * self.blocks * len(self.multipliers)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """In units of x."""
        return tuple((self.classes.sigmas / 2).tolist())

    def build(self):
        """The model with random weights, on torch's current default device."""
        from sgm_engine.models.cdm.model import CDM
        from sgm_engine.models.cdm.networks import UNet

        names = ("width", "multipliers", "blocks", "attention", "patch", "fourier", "features", "baseline")
        options = {name: getattr(self, name) for name in names}
        network = UNet(self.channels, self.image_size, self.classes, **options)
        shape = (self.channels, self.image_size, self.image_size)
        model = CDM(network, self.classes, shape, scale=2.0, shift=-1.0, plan=self.plan and dict(self.plan))
        model.config = self
        return model

    def to_json(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({"architecture": self.architecture, **fields})

    @classmethod
    def from_dict(cls, fields: Mapping) -> CDMConfig:
        """Every field by name; unknown and missing names raise ValueError."""
        fields = {k: v for k, v in fields.items() if k != "architecture"}
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(k) for k in fields.keys() - known):
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}; a CDM has: {', '.join(sorted(known))}")
        if missing := sorted(known - set(OPTIONAL) - fields.keys()):
            raise ValueError(f"config lacks fields: {', '.join(missing)}")
        return cls(**fields)

    @staticmethod
    def _whole(name: str, value: object, low: int) -> None:
        if type(value) is not int or not low <= value <= 100_000:
            raise ValueError(f"{name} must be an integer between {low} and 100000, got {value!r}")
