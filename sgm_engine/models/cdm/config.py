"""What defines a classification diffusion model of this package, as one validated, serialisable record."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence

import numpy as np

from sgm_engine.models.cdm.classes import SCHEDULES, NoiseClasses, check_label
from sgm_engine.models.config import _check_plan

WHOLE = ("channels", "image_size", "width", "blocks", "patch", "levels")
MAX_BLOCKS, MAX_WIDTH = 1000, 65_536
OPTIONAL = ("plan", "schedule_options", "attention", "fourier", "features", "baseline", "patch")
POTENTIAL = ("potentials", "mixing", "focus")  # left out of a file where they are None
LATER = {"labels": 0, "dropout": 0.0, "denoiser": False, "published": False, "class_label": None, "guidance": 1.0}
UNET_ONLY = {"attention": (), "fourier": (), "features": None, "baseline": None, "patch": 1}
MAX_PIXELS = 4096  # whose covariance a GaussianBase holds
MAX_TABLE = 4_000_000  # pixels × levels of its tables, of which there are some


@dataclasses.dataclass(frozen=True)
class CDMConfig:
    """A network that tells T + 2 noise levels of images in [0, 1] apart. ValueError names the field and the value.

    width, multipliers, blocks, attention [pixels], patch, fourier, features, baseline: as networks.UNet; where
    ``potentials`` is given, width, multipliers, blocks, potentials and mixing as potential.PotentialNet. schedule: one
    of classes.SCHEDULES, of ``levels`` classes between data and reference, with schedule_options; it applies to
    u = 2·x − 1. focus: (least σ, greatest σ, share): in training, classes of other σ are met ``share`` times as often
    (data and reference, too, as often as the middle). labels: how many classes of images the network is told, beside
    "none"; class_label and guidance: as model.OfClasses. dropout: share of a U-Net's numbers that training zeroes in
    each residual block. denoiser: a DDM, which only denoises, in the place of a CDM. published: networks.UNet's.
    plan: as in models.ModelConfig.
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
    potentials: int | None = None
    mixing: Sequence[int] | None = None
    focus: Sequence[float] | None = None
    labels: int = 0
    dropout: float = 0.0
    denoiser: bool = False
    published: bool = False
    class_label: int | None = None
    guidance: float = 1.0
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
        if self.potentials is not None or self.mixing is not None:
            self._check_potentials()
        if self.focus is not None:
            triple = self.focus
            if (
                not isinstance(triple, (list, tuple))
                or len(triple) != 3
                or not all(type(v) in (int, float) for v in triple)
            ):
                raise ValueError(f"focus must be [least σ, greatest σ, share], got {triple!r}")
            low, high, share = map(float, triple)
            if not (0 <= low < high and 0 < share <= 1):
                raise ValueError(f"focus needs 0 <= least < greatest and 0 < share <= 1, got {triple!r}")
            object.__setattr__(self, "focus", (low, high, share))
        self._check_labels()
        if self.plan is not None:
            object.__setattr__(self, "plan", _check_plan(self.plan))
        _ = self.classes  # refuses what the schedule refuses

    @property
    def classes(self) -> NoiseClasses:
        return SCHEDULES[self.schedule](self.levels, **self.schedule_options)

    @property
    def prior(self) -> np.ndarray | None:
        """How often each class is met in training [T + 2], up to a factor; None: equally."""
        if self.focus is None:
            return None
        low, high, share = self.focus
        sigmas = self.classes.sigmas[::-1]
        return np.r_[1.0, np.where((sigmas >= low) & (sigmas <= high), 1.0, share), 1.0]

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
        from sgm_engine.models.cdm.model import CDM, DDM

        kind, plan = DDM if self.denoiser else CDM, self.plan and dict(self.plan)
        shape = (self.channels, self.image_size, self.image_size)
        told = {"class_label": self.class_label, "guidance": self.guidance}
        model = kind(self._network(), self.classes, shape, 2.0, -1.0, self.prior, plan=plan, **told)
        model.config = self
        return model

    def _network(self):
        from sgm_engine.models.cdm.networks import UNet
        from sgm_engine.models.cdm.potential import PotentialNet

        names = ["width", "multipliers", "blocks", "labels"]
        unet = [*UNET_ONLY, "dropout", "denoiser", "published"]
        names += unet if self.potentials is None else ["potentials", "mixing"]
        network = UNet if self.potentials is None else PotentialNet
        return network(self.channels, self.image_size, self.classes, **{name: getattr(self, name) for name in names})

    def _check_labels(self) -> None:
        self._whole("labels", self.labels, 0)
        object.__setattr__(self, "guidance", check_label(self.class_label, self.guidance, self.labels)[1])
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        for name in ("denoiser", "published"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.potentials is not None and (self.dropout or self.published):
            raise ValueError("dropout and published belong to a U-Net, which has no potentials: leave out one of them")
        if self.published and (self.patch > 1 or self.baseline or self.image_size % 2 ** (len(self.multipliers) - 1)):
            raise ValueError(
                "published needs patch 1, no baseline and an image_size that halves at every resolution, got "
                f"{self.patch}, {self.baseline} and {self.image_size}"
            )

    def _check_potentials(self) -> None:
        self._whole("potentials", self.potentials, 1)
        mixing = self.mixing
        if not isinstance(mixing, (list, tuple)) or len(mixing) != 2:
            raise ValueError(f"mixing must be [channels, hidden], got {mixing!r}")
        for v in mixing:
            self._whole("mixing", v, 1)
        object.__setattr__(self, "mixing", tuple(mixing))
        for name, value in UNET_ONLY.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} belongs to a U-Net, which has no potentials: leave out one of the two")
        if len(self.multipliers) != 2 or self.image_size % 4:
            raise ValueError(
                "a network of potentials needs two multipliers and an image_size that divides by 4, got "
                f"{list(self.multipliers)} and {self.image_size}"
            )
        if self.channels * self.image_size**2 > MAX_PIXELS:
            raise ValueError(
                f"potentials need a covariance of at most {MAX_PIXELS} pixels, got {self.channels}×{self.image_size}²"
            )
        if self.channels * self.image_size**2 * self.levels > MAX_TABLE:
            raise ValueError(f"potentials need pixels × levels of at most {MAX_TABLE}, got {self.levels} levels")
        if max(4 * self.channels * self.potentials, *mixing) > MAX_WIDTH:
            raise ValueError(
                f"potentials and mixing must make at most {MAX_WIDTH} channels, got {self.potentials}, {mixing}"
            )

    def to_json(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields = {name: value for name, value in fields.items() if name not in POTENTIAL or value is not None}
        fields = {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}
        return json.dumps({"architecture": self.architecture, **fields})

    @classmethod
    def from_dict(cls, fields: Mapping) -> CDMConfig:
        """Every field by name; unknown and missing names raise ValueError."""
        fields = {k: v for k, v in fields.items() if k != "architecture"}
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(k) for k in fields.keys() - known):
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}; a CDM has: {', '.join(sorted(known))}")
        if missing := sorted(known - {*OPTIONAL, *POTENTIAL, *LATER} - fields.keys()):
            raise ValueError(f"config lacks fields: {', '.join(missing)}")
        return cls(**fields)

    @staticmethod
    def _whole(name: str, value: object, low: int) -> None:
        if type(value) is not int or not low <= value <= 100_000:
            raise ValueError(f"{name} must be an integer between {low} and 100000, got {value!r}")
