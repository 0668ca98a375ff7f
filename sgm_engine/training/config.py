"""What a run of ``sgm train`` is: one validated record, read from a small YAML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgm_engine.files.reading import MAX_YAML, parse_yaml, read_text
from sgm_engine.models import ARCHITECTURES, ModelConfig
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.config import MAX_LEVELS
from sgm_engine.models.family import NETWORKS, FamilyConfig
from sgm_engine.models.multi_sample import MAX_COPIES, MultiSampleConfig
from sgm_engine.plans.schedule import geometric
from sgm_engine.training import families
from sgm_engine.training.objectives import OBJECTIVES

FOLDER = Path(__file__).parent / "configs"
WEIGHTS = {"float32": torch.float32, "float16": torch.float16}
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every field has a default but the network's; a ValueError names the field and the value.

    architecture, ngf, divide_by_sigma: as models.ModelConfig. sigma_begin, sigma_end, levels: geometric, in units of
    pixels in [0, 1]. architecture "CDM": as cdm.CDMConfig, ngf its width, ``network`` the fields that are not here.
    A network of models.family: ngf its width, ``network`` its other arguments; preconditioning: {"name" of a scheme of
    models.preconditioning, its constants}, empty for the usual one, and for ddpm the fields of a diffusers scheduler;
    levels: also of a ddpm's timesteps, evenly; plan: with "nfe", evaluations.
    image_size: of a folder of pictures; other data know theirs, and a divisor of it takes means of blocks. objective:
    of OBJECTIVES ("cdm" for a CDM, "ddm" for a denoiser of its network), and its keyword arguments in
    objective_options. copies: of multi_sample, each with √copies times the noise of the levels, which are those of
    their mean. reference_batch: so many further images a step, of stable_target. direct_steps: so many first steps
    train a CDM of potentials as a denoiser (``ddm``), warmup and decay apart. steps: optimizer steps in all; batch:
    images a step, over all processes. warmup: steps; decay: share of the steps, at the end, over which lr falls to 0;
    drop_every: steps, after which it is a tenth; label_dropout: share of labels that training hides from a network with
    labels, for guidance; ema: 0 keeps no average; clip: of the gradient's norm, 0 none. precision: float32, bfloat16 or
    float16 (mixed). compile_norms: torch.compile of the norms, whose plain formula is slow on a CPU. weights: what
    model.safetensors holds, float32 or float16. plan: "name" and arguments, kept with the weights and used by the
    sample grids. *_every: steps, 0 never.
    """

    architecture: str
    levels: int
    ngf: int | None = None
    sigma_begin: float | None = None
    sigma_end: float = 0.01
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preconditioning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    divide_by_sigma: bool = True
    image_size: int | None = None
    flip: bool = False
    objective: str = "denoising"
    copies: int = 1
    reference_batch: int = 0
    objective_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    direct_steps: int = 0
    label_dropout: float = 0.1
    steps: int = 200_000
    batch: int = 128
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    warmup: int = 0
    decay: float = 0.0
    drop_every: int = 0
    ema: float = 0.999
    clip: float = 0.0
    precision: str = "float32"
    compile_norms: bool = False
    weights: str = "float32"
    plan: Mapping[str, Any] | None = None
    seed: int = 0
    log_every: int = 50
    sample_every: int = 1000
    save_every: int = 1000
    validate_every: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, getattr(self, field.name), str(field.type))
        for name in ("steps", "batch", "log_every"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "direct_steps",
            "warmup",
            "drop_every",
            "clip",
            "sample_every",
            "save_every",
            "validate_every",
            "seed",
            "reference_batch",
        ):
            self._need(name, getattr(self, name) >= 0, "at least 0")
        for name in ("ema", "beta1", "beta2"):
            self._need(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._need("levels", 1 <= self.levels <= MAX_LEVELS, f"between 1 and {MAX_LEVELS}")
        self._need("decay", 0 <= self.decay <= 1, "in [0, 1]")
        self._need("label_dropout", 0 <= self.label_dropout < 1, "in [0, 1)")
        self._need("lr", self.lr > 0, "positive")
        self._need("weights", self.weights in WEIGHTS, f"one of {', '.join(WEIGHTS)}")
        self._need("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._need("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        cdm = self.architecture == CDMConfig.architecture
        told = self.objective in ("cdm", "ddm")
        self._need("objective", cdm == told, "cdm or ddm if, and only if, the architecture is CDM")
        many = self.objective == "multi_sample"
        limit = f"between 2 and {MAX_COPIES} if, and only if, the objective is multi_sample, else 1"
        self._need("copies", 2 <= self.copies <= MAX_COPIES if many else self.copies == 1, limit)
        stable = self.objective == "stable_target"
        self._need("reference_batch", self.reference_batch == 0 or stable, "0 unless the objective is stable_target")
        direct = self.direct_steps == 0 or (self.objective == "cdm" and self.network.get("potentials") is not None)
        self._need("direct_steps", direct, "0 for a network without potentials")
        self._need("direct_steps", self.direct_steps < self.steps, f"below steps = {self.steps}")
        self.model(1, 32 if self.image_size is None else self.image_size)  # checks what the network's config checks

    def model(self, channels: int, image_size: int) -> ModelConfig | CDMConfig | FamilyConfig | MultiSampleConfig:
        """The network for images [channels, image_size, image_size]."""
        if self.copies > 1:
            if self.architecture not in ARCHITECTURES:
                known = ", ".join(ARCHITECTURES)
                raise ValueError(f"architecture must be one of {known} for several copies, got {self.architecture}")
            one = dataclasses.replace(self, copies=1, objective="denoising", objective_options={})
            return MultiSampleConfig(self.copies, one.model(channels * self.copies, image_size))
        if self.architecture in NETWORKS:
            return families.record(self, channels, image_size)
        if self.preconditioning:
            raise ValueError(f"preconditioning must be empty for {self.architecture}, got {dict(self.preconditioning)}")
        if self.architecture == CDMConfig.architecture:
            fields = {"channels": channels, "image_size": image_size, "width": self.ngf, "levels": self.levels}
            fields |= dict(self.network) | {"plan": self.plan}
            return CDMConfig.from_dict(fields | ({"denoiser": True} if self.objective == "ddm" else {}))
        if self.network:
            raise ValueError(f"network must be empty for {self.architecture}, got {dict(self.network)}")
        if self.sigma_begin is None:
            raise ValueError(f"sigma_begin is missing: the first noise level of {self.architecture}")
        sigmas = geometric(self.sigma_begin, self.sigma_end, self.levels)
        values = tuple(np.float32(sigmas).tolist())
        return ModelConfig(self.architecture, channels, image_size, self.ngf, values, self.divide_by_sigma, self.plan)

    def to_yaml(self) -> str:
        import yaml

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, allow_unicode=True)

    def _check_type(self, name: str, value: object, kind: str) -> None:
        base = kind.split(" | ")[0]
        if base == "float" and isinstance(value, str):  # YAML takes 2e-5 for text
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{name} must be a number, got {value!r}") from None
        if base == "float" and type(value) is int:
            value = float(value)
        expected = {"int": int, "float": float, "bool": bool, "str": str}.get(base)
        allowed = value is None and "None" in kind
        if not allowed and not (type(value) is expected if expected else isinstance(value, Mapping)):
            raise ValueError(f"{name} must be {base.split('[')[0]}, got {value!r}")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if isinstance(value, Mapping):
            value = {key: _number(v) for key, v in value.items()}
        object.__setattr__(self, name, value)

    def _need(self, name: str, good: bool, what: str) -> None:
        if not good:
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    @classmethod
    def read(cls, name: str | Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
        """A file, or one of ``config_names()``, with ``changes`` to its fields. YAML, as data only."""
        path = Path(name).expanduser()
        if not path.is_file():
            path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"config {str(name)!r}: no such file, and none of {', '.join(config_names())}")
        try:
            fields = parse_yaml(read_text(path, MAX_YAML))
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: must be a list of names and values, got {type(fields).__name__}")
        fields |= changes or {}
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(str(key) for key in fields.keys() - known):
            raise ValueError(f"{path}: unknown {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
        if missing := sorted(required - fields.keys()):
            raise ValueError(f"{path}: lacks {', '.join(missing)}")
        return cls(**fields)


def config_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def _number(value: object) -> object:
    """2e-5, which YAML 1.1 reads as text, as a float; everything else as it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
