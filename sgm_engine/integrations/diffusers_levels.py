"""What a diffusers scheduler's configuration says of a network: its noise levels, and how it is told them.

Families that a plan can express are expressed; ``translated`` refuses the others by name, and what it cannot honour.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sgm_engine.plans.schedule import check_sigmas, geometric, karras

# Schedulers that differ in how they walk over one family's levels, and agree in what a network predicts at a level.
OF_BETAS = """DDPM DDIM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete
    KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep SASolver
    DDPMParallel DDIMParallel DDIMInverse DPMSolverMultistepInverse"""
OF_EDM = "EDMEuler EDMDPMSolverMultistep"
OF_FLOW = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete"
FAMILY = {f"{name}Scheduler": family for names, family in ((OF_BETAS, "betas"), (OF_EDM, "edm"), (OF_FLOW, "flow"))
          for name in names.split()}  # fmt: skip
SHARED = ("num_train_timesteps",)
FIELDS = {
    "betas": ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "clip_sample",
              "clip_sample_range"),
    "edm": ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"),
    "flow": ("shift",),
}  # fmt: skip
REFUSED = {
    "thresholding": "dynamic thresholding changes the estimate by its own quantiles",
    "rescale_betas_zero_snr": "its first level has no signal, that is an infinite sigma",
    "snr_shift_scale": "it shifts the levels that its betas say",
    "use_flow_sigmas": "it mixes two families of levels",
    "use_dynamic_shifting": "the shift depends on the image's size: pass shift=",
    "invert_sigmas": "its levels ascend",
    "shift_terminal": "the levels are stretched to another end",
    "stochastic_sampling": "it is another law of motion",
    "use_karras_sigmas": "the levels of a flow are its own",
    "use_exponential_sigmas": "the levels of a flow are its own",
    "use_beta_sigmas": "the levels of a flow are its own",
}
FLOWS_ONLY = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # elsewhere they choose levels, no more
EARLIER = {"predict_epsilon", "tensor_format", "timestep_values"}  # fields of diffusers' first versions
LAST_T = 1 - 1e-4  # a flow's first level, t = 1, has an infinite sigma; this one leaves float32 its digits


def translated(config: Mapping) -> dict[str, object]:
    """A configuration of diffusers' as PlanScheduler's arguments. ValueError names the class or the field refused.

    A file names its class; a live scheduler's configuration does not, and is known by its fields.
    """
    name = config.get("_class_name")
    if name == "PlanScheduler" or (name is None and "plan" in config):
        return dict(config)
    family = _by_fields(config) if name is None else FAMILY.get(name)
    foreign = _foreign(config, family) if name is None and family is not None else None
    name = name or f"this configuration{f' with {foreign!r}' if foreign else ''}"
    if family is None or foreign:
        raise ValueError(
            f"a plan cannot stand for {name}: PlanScheduler takes the configurations of "
            f"{', '.join(sorted(FAMILY))}; for another network use as_score, or PlanScheduler(sigmas=[…])"
        )
    for field, why in REFUSED.items():
        if config.get(field) and not (field in FLOWS_ONLY and family != "flow"):
            raise ValueError(
                f"{field}={config[field]!r} of {name} cannot be honoured: {why}; pass a config without it if that "
                "is meant"
            )
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            f"timestep_type='continuous' of {name}: its network is told ¼·ln σ, not a timestep: use as_score"
        )
    if str(config.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"variance_type={config['variance_type']!r} of {name}: such a network has twice the channels, of which the "
            "second half is the variance; wrap it to return the first half, and pass a config with 'fixed_small'"
        )
    found = {field: config[field] for field in (*SHARED, *FIELDS[family]) if field in config}
    if config.get("predict_epsilon") is False:  # diffusers' own name for it before prediction_type
        found["prediction_type"] = "sample"
    if family == "edm":
        predictions = {"epsilon": "edm", "v_prediction": "edm_negative"}
        if (said := config.get("prediction_type", "epsilon")) not in predictions:
            raise ValueError(f"prediction_type={said!r} of {name} is not known: epsilon or v_prediction")
        found["prediction_type"] = predictions[said]
    if family == "flow":
        found["prediction_type"] = "flow"
    return found


def _by_fields(config: Mapping) -> str | None:
    if "beta_schedule" in config:
        return "betas"
    if "sigma_data" in config and "sigma_schedule" in config:
        return "edm"
    return "flow" if "shift" in config and "base_shift" in config else None


def _foreign(config: Mapping, family: str) -> str | None:
    """A field that no scheduler of this family has; or one that another family's schedulers have alone."""
    import diffusers

    classes = [getattr(diffusers, name, None) for name, of in FAMILY.items() if of == family]
    known = {field for cls in classes if cls is not None for field in inspect.signature(cls.__init__).parameters}
    if family == "edm" and "solver_order" in config and "algorithm_type" not in config:  # tells its network atan σ
        return "solver_order"
    return next((f for f in config if not f.startswith("_") and f not in known | EARLIER), None)


class Levels(Protocol):
    """Noise levels of a network. count: how many may be asked for.

    pick(n) → (sigmas [n], descending; told [n], what the network is told). sigma_of(told) → sigmas.
    """

    count: int

    def pick(self, n: int) -> tuple[np.ndarray, np.ndarray]: ...

    def sigma_of(self, told: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Trained:
    """Levels one by one, sigmas [L] ascending. by_step: told the index, a timestep; else that from the noisiest."""

    sigmas: np.ndarray
    by_step: bool

    @property
    def count(self) -> int:
        return len(self.sigmas)

    def pick(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        rank = np.linspace(self.count - 1, 0, n).round().astype(np.int64)
        return check_sigmas(self.sigmas[rank]), rank if self.by_step else self.count - 1 - rank

    def sigma_of(self, told: np.ndarray) -> np.ndarray:
        return self.sigmas[told if self.by_step else self.count - 1 - told]


@dataclass(frozen=True)
class Edm:
    """Levels of arXiv 2206.00364, eq. 5, told ¼·ln σ."""

    count: int
    sigma_min: float
    sigma_max: float
    schedule: str
    rho: float

    def pick(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        ends = self.sigma_max, self.sigma_min
        if n == 1:
            sigmas = np.array([self.sigma_max])
        elif self.schedule == "karras":
            sigmas = karras(*ends, n, self.rho)
        else:
            sigmas = geometric(*ends, n)
        return check_sigmas(sigmas), np.log(sigmas) / 4

    def sigma_of(self, told: np.ndarray) -> np.ndarray:
        return np.exp(4 * np.asarray(told, np.float64))


@dataclass(frozen=True)
class Flow:
    """Times t of a rectified flow, (1 − t)·data + t·noise, even and then shifted; told t·count. σ = t/(1 − t)."""

    count: int
    shift: float

    def pick(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        even = np.linspace(1, self._shifted(1 / self.count), n)
        t = np.minimum(self._shifted(even), LAST_T)
        return check_sigmas(t / (1 - t)), t * self.count

    def sigma_of(self, told: np.ndarray) -> np.ndarray:
        t = np.minimum(np.asarray(told, np.float64) / self.count, LAST_T)
        return t / (1 - t)

    def _shifted(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)
