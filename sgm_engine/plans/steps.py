"""How each sampler steps with some weights: a schedule, where it ends, and options that were tuned for them.

They travel in the front (front.py) as {sampler: {"schedule": …, "sigma_min": …, and options of the sampler}}.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sgm_engine.plans.samplers import SAMPLERS, options_of
from sgm_engine.plans.schedule import SCHEDULES, check_number

OF_PATH = ("schedule", "sigma_min", "rho")
FEW = 8  # sigmas of the plan that tries a rule
STARTS = {"start", "start_scale", "start_shift"}  # a start is the data law's


def check_steps(steps: object) -> dict[str, dict[str, object]]:
    """A copy of ``steps``; ValueError names what is wrong. What an option may be, its sampler checks."""
    if not isinstance(steps, Mapping):
        raise ValueError(f"steps must be rules by sampler, got {steps!r:.60}")
    for name, rule in steps.items():
        if name not in SAMPLERS:
            raise ValueError(f"steps must be of {', '.join(SAMPLERS)}, got {name!r:.60}")
        if not isinstance(rule, Mapping) or rule.get("schedule") not in SCHEDULES:
            raise ValueError(f"the steps of {name} must name a schedule of {', '.join(SCHEDULES)}, got {rule!r:.60}")
        if unknown := sorted(map(str, rule.keys() - ({*OF_PATH, *options_of(name)} - STARTS))):
            raise ValueError(f"the steps of {name} take no {', '.join(unknown)}")
        if not 0 < check_number("sigma_min", rule.get("sigma_min")) < np.inf:
            raise ValueError(f"the steps of {name} must have a sigma_min > 0, got {rule['sigma_min']}")
        if "rho" in rule and rule["schedule"] != "karras":
            raise ValueError(f"the steps of {name}: rho is of karras, not of {rule['schedule']}")
    return {name: dict(rule) for name, rule in steps.items()}


def options_in(rule: Mapping[str, object]) -> dict[str, object]:
    """What the sampler is told of a rule."""
    return {k: v for k, v in rule.items() if k not in OF_PATH}


def path_of(rule: Mapping[str, object], sigma_max: float, count: int) -> np.ndarray:
    """``count`` sigmas from sigma_max to where the rule ends."""
    rho = {"rho": rule["rho"]} if "rho" in rule else {}
    return SCHEDULES[rule["schedule"]](sigma_max, rule["sigma_min"], count, **rho)


def words(rule: Mapping[str, object]) -> str:
    """The rule in a few words."""
    rest = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in rule.items() if k not in OF_PATH[:2])
    return ", ".join([f"{rule['schedule']} to {rule['sigma_min']:g}", *rest])


def check_plans(steps: Mapping[str, Mapping[str, object]], sigma_max: float) -> None:
    """ValueError or TypeError of a sampler that refuses its own rule, from ``sigma_max`` on."""
    for name, rule in steps.items():
        SAMPLERS[name](path_of(rule, sigma_max, FEW), **options_in(rule))
