"""A network of a diffusion family as f(x, level) → score of x in [0, 1], and the record that rebuilds it.

The families train on data in [−1, 1] or elsewhere; here x = (y − low)/(high − low) is what every other model of this
package has, and noise levels are in units of x. So samples, training data, likelihoods and pictures need no conversion.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from sgm_engine.models import preconditioning
from sgm_engine.models.adm import ADMUNet
from sgm_engine.models.edm2_unet import EDM2UNet
from sgm_engine.models.edm_unet import DhariwalUNet, SongUNet
from sgm_engine.models.lucidrains import Unet
from sgm_engine.models.score_model import checked_score
from sgm_engine.models.score_sde import NCSNpp
from sgm_engine.models.unet2d import UNet2D
from sgm_engine.plans.front import Front
from sgm_engine.plans.law import DataLaw
from sgm_engine.plans.schedule import Sigmas, check_sigmas, karras

NETWORKS = {cls.__name__: cls for cls in (NCSNpp, SongUNet, DhariwalUNet, EDM2UNet, ADMUNet, UNet2D, Unet)}
ONE_HOT = (SongUNet, DhariwalUNet, EDM2UNet)
MAX_CHANNELS, MAX_SIZE = 1024, 8192
ENOUGH = 300.0  # where few steps begin at most: of a cosine schedule the last level is σ 20,000, all noise


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """architecture: a class of NETWORKS, network: its arguments. channels and image_size (height, width): of one
    sample.

    preconditioning: {"name": of preconditioning.SCHEMES, its constants}. data_range: (low, high) of what it was trained
    on; sigma_min, sigma_max: noise in those units. plan: {"name": a sampler, its options, "nfe": evaluations}. clip:
    the denoised image is clamped to this distance from 0, as the file's sampler does (None: it does not).
    class_label: of the samples, None where there are no classes or none was chosen. family: in words. ValueError
    names a field and its value.
    """

    architecture: str
    network: Mapping[str, object]
    channels: int
    image_size: tuple[int, int]
    preconditioning: Mapping[str, object]
    data_range: tuple[float, float]
    sigma_min: float
    sigma_max: float
    plan: Mapping[str, object]
    clip: float | None = None
    class_label: int | None = None
    family: str = ""

    def __post_init__(self):
        if self.architecture not in NETWORKS:
            raise ValueError(f"architecture must be one of {', '.join(NETWORKS)}, got {self.architecture!r}")
        size = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
        object.__setattr__(self, "image_size", size)
        object.__setattr__(self, "data_range", tuple(self.data_range))
        for name, values, limit in (("channels", (self.channels,), MAX_CHANNELS), ("image_size", size, MAX_SIZE)):
            if len(values) not in (1, 2) or any(type(v) is not int or not 1 <= v <= limit for v in values):
                raise ValueError(f"{name} must be integers between 1 and {limit}, got {values}")
        low, high = self.data_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"data_range must be low < high, got {self.data_range}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_min must be positive and below sigma_max, got {self.sigma_min}, {self.sigma_max}")
        for name in ("network", "preconditioning", "plan"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be an object with named fields, got {getattr(self, name)!r:.60}")
        for name, value in self.network.items():
            _check_argument(name, value)
        arguments = inspect.signature(NETWORKS[self.architecture]).parameters
        if unknown := sorted(set(self.network) - set(arguments)):
            raise ValueError(f"network of {self.architecture} takes no {', '.join(unknown)}")
        preconditioning.told(self.preconditioning, np.array([self.sigma_max, self.sigma_min]))
        if not {"name", "nfe"} <= self.plan.keys():
            raise ValueError(f"plan must have a name and nfe, its evaluations, got {dict(self.plan)}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if self.class_label is not None and not (
            type(self.class_label) is int and 0 <= self.class_label < self.classes
        ):
            held = f"0 to {self.classes - 1}" if self.classes else "none: the network has no classes"
            raise ValueError(f"class_label must be {held}, got {self.class_label!r}")

    @property
    def classes(self) -> int:
        return int(
            self.network.get("label_dim")
            or self.network.get("num_classes")
            or self.network.get("num_class_embeds")
            or 0
        )

    @property
    def sigmas(self) -> np.ndarray:
        """The levels of its plan, in units of x."""
        from sgm_engine.plans.samplers import levels_of_nfe

        options = {k: v for k, v in self.plan.items() if k not in ("name", "nfe")}
        return levels(self, levels_of_nfe(self.plan["name"], self.plan["nfe"], options))

    def build(self) -> FamilyModel:
        """The model with random weights, on torch's current default device."""
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in self.network.items()}
        return FamilyModel(NETWORKS[self.architecture](**arguments), self)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_dict(cls, fields: Mapping) -> FamilyConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(k) for k in fields.keys() - known):
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}")
        if missing := sorted(known - {"clip", "class_label", "family"} - fields.keys()):
            raise ValueError(f"config lacks fields: {', '.join(missing)}")
        return cls(**fields)


def _check_argument(name: str, value: object) -> None:
    """ValueError for what no network of these families has: a hostile file could ask for a billion blocks."""
    values = value if isinstance(value, (list, tuple)) else [value]
    plain = len(values) <= 64 and all(isinstance(v, (int, float, str, bool, type(None))) for v in values)
    limit = 64 if "blocks" in name or "layers" in name else 1_000_000
    if not plain or any(isinstance(v, (int, float)) and not -1e6 <= v <= limit for v in values):
        raise ValueError(f"network: {name} must be numbers up to {limit} or names, got {value!r:.60}")


def levels(config: FamilyConfig, n: int, own: bool = False) -> np.ndarray:
    """n noise levels of x, descending. own: those at which the file's own sampler asks a DDPM; else Karras's."""
    scheme, span = config.preconditioning, config.data_range[1] - config.data_range[0]
    if own and scheme["name"] == "ddpm":
        trained = preconditioning.ddpm_levels(scheme["alphas_cumprod"])
        return trained[preconditioning.spaced(len(trained), n, scheme.get("steps"))] / span
    found = karras(min(config.sigma_max, ENOUGH), config.sigma_min, n)
    if scheme["name"] == "iddpm":  # it knows its own levels only
        known = preconditioning.iddpm_levels(**{k: v for k, v in scheme.items() if k != "name"})
        found = np.unique(known[np.abs(known[None, :] - found[:, None]).argmin(1)])[::-1]
    return found / span


class FamilyModel(nn.Module):
    """forward(x [N, C, H, W], level [N] int64) → score [N, C, H, W], float32. ``.network`` is the family's own module.

    sigmas [L], descending, in units of x: None takes those of the config's plan. averaged: whether the weights are,
    None where nobody knows.
    """

    averaged: bool | None = None
    law: DataLaw | None = None  # of the data, where it came with the weights
    front: Front | None = None  # tuned plans, likewise

    def __init__(self, network: nn.Module, config: FamilyConfig, sigmas: Sequence[float] | None = None):
        super().__init__()
        self.network, self.config = network, config
        low, high = config.data_range
        self.low, self.span = float(low), float(high - low)
        sigmas = check_sigmas(config.sigmas if sigmas is None else sigmas)
        y_sigmas = sigmas * self.span
        if y_sigmas[0] > config.sigma_max * (1 + 1e-5) or y_sigmas[-1] < config.sigma_min * (1 - 1e-5):
            raise ValueError(
                f"sigmas must lie between {config.sigma_min / self.span:.6g} and {config.sigma_max / self.span:.6g} "
                f"(in units of data in [0, 1]; the network was trained on [{low:g}, {high:g}]), "
                f"got {sigmas[0]:g} to {sigmas[-1]:g}"
            )
        row = preconditioning.told(config.preconditioning, y_sigmas)
        columns = {"sigmas": sigmas, "c_in": row.c_in, "q": row.q, "s": row.s, "variance": y_sigmas**2}
        for name, value in columns.items():
            column = torch.tensor(np.broadcast_to(value, len(sigmas)).copy(), dtype=torch.float32, device="cpu")
            self.register_buffer(name, column, persistent=False)
        kind = torch.int64 if np.issubdtype(row.told.dtype, np.integer) else torch.float32
        self.register_buffer("told", torch.tensor(row.told, dtype=kind, device="cpu"), persistent=False)
        self.scaled, self.plain = bool((self.c_in != 1).any()), not np.any(row.s)
        label = None
        if config.class_label is not None:
            label = torch.tensor([config.class_label], device="cpu")
            if isinstance(network, ONE_HOT):
                label = nn.functional.one_hot(label, config.classes).float()
        self.register_buffer("label", label, persistent=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return (self.config.channels, *self.config.image_size)

    def options_of(self, name: str, sigma: float) -> dict[str, object]:
        """Options of the plan ``name`` from noise ``sigma`` on, as the file's own sampler has them."""
        found = self.start_at(sigma) | ({"start": "normal"} if name == "annealed_langevin" else {})
        steps = self.config.preconditioning.get("steps") or {}
        if name == "ancestral" and steps.get("scheduler", {}).get("variance_type") == "fixed_large":
            found["beta_unit"] = 1 / self.span
        return found

    def start_at(self, sigma: float) -> dict[str, float]:
        """The law of a first state at noise ``sigma``, as options of a plan: that of the data where it came with the
        weights, else around the middle of y's range, 0."""
        if self.law is not None:
            return self.law.start(sigma)
        scheme, scale = self.config.preconditioning, sigma * self.span
        if scheme["name"] in ("vp", "sub_vp", "ddpm"):
            scale = math.hypot(1, scale)
        return {"start_scale": scale / self.span, "start_shift": -self.low / self.span}

    @property
    def plan(self) -> dict[str, object]:
        """Name and options of the sampler of few steps that goes with ``sigmas``."""
        own = {k: v for k, v in self.config.plan.items() if k != "nfe"}
        return own | self.start_at(float(self.sigmas[0]))

    def levels(self, n: int, own: bool = False) -> np.ndarray:
        """n noise levels for ``at_sigmas``; own: those of the file's own sampler, where it has discrete ones."""
        return levels(self.config, n, own)

    def at_sigmas(self, sigmas: Sigmas) -> FamilyModel:
        """The same network, its weights shared, at other levels."""
        return self._like(FamilyModel(self.network, self.config, sigmas))

    def with_class(self, class_label: int | None) -> FamilyModel:
        """The same network, its weights shared, drawing another class."""
        config = dataclasses.replace(self.config, class_label=class_label)
        return self._like(FamilyModel(self.network, config, self.sigmas))

    def _like(self, other: FamilyModel) -> FamilyModel:
        other.averaged, other.law, other.front = self.averaged, self.law, self.front
        return other.train(self.training).to(self.sigmas.device)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        def column(of: Tensor) -> Tensor:
            return of.index_select(0, level)[:, None, None, None]

        y = x if self.span == 1 and self.low == 0 else self.span * x + self.low
        told = self.told.index_select(0, level)
        given = column(self.c_in) * y if self.scaled else y
        if self.config.classes:
            found = self.network(given, told, self._labels(x.shape[0]))
        else:
            found = self.network(given, told)
        found = checked_score(found, x).float()
        found = column(self.q) * (found if self.plain else found - column(self.s) * y)
        if self.config.clip is not None:
            variance, limit = column(self.variance), self.config.clip
            found = ((y + variance * found).clamp(-limit, limit) - y) / variance
        return found if self.span == 1 else self.span * found

    def _labels(self, n: int) -> Tensor | None:
        if self.label is None:
            if isinstance(self.network, ONE_HOT):
                return None
            raise ValueError(f"this network has {self.config.classes} classes: choose one, with_class(n)")
        return self.label.expand(n, *self.label.shape[1:])


fx.wrap("checked_score")  # as in score_model.py: one call in a traced graph
