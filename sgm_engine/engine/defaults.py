"""The plan of a request that names none. Whatever the model, it is one that need not diverge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sgm_engine.plans.plan import Plan, annealed_langevin, ddim
from sgm_engine.plans.report import refuse_divergence
from sgm_engine.plans.samplers import dpm_solver_2m

FEW = 30  # evaluations of a model that is no score network


def default_plan(model: object, sigmas: np.ndarray) -> Plan:
    """What the model's weights recommend; else, of a network that predicts data, noise or a velocity, DPM-Solver++(2M)
    over at most FEW of its levels; else annealed Langevin (NCSN).

    sigmas: the model's [L]. A model with curvature (guidance.py) gets Langevin steps that are short enough for it.
    """
    curvature = getattr(model, "curvature", None)
    if getattr(model, "plan", None) or getattr(model, "front", None):
        from sgm_engine.checkpoints.bundled import plan_for

        plan = plan_for(model)
        return plan if curvature is None or _stable(plan, curvature) else _langevin(sigmas, sigmas, curvature)
    if getattr(model, "predicts", "score") == "score":
        return _langevin(sigmas, sigmas, curvature)
    return few_steps(sigmas) if curvature is None else _langevin(_some(sigmas), sigmas, curvature)


def few_steps(sigmas: np.ndarray) -> Plan:
    """A first look at what a network of these levels [L] draws: DPM-Solver++(2M), at most FEW evaluations.

    DDIM instead where the levels are too uneven for second order.
    """
    some = _some(sigmas)
    try:
        return dpm_solver_2m(some).on_levels(sigmas)
    except ValueError:  # it would diverge; ddim does on no levels
        return ddim(some).on_levels(sigmas)


def _some(sigmas: np.ndarray) -> np.ndarray:
    return sigmas[np.linspace(0, len(sigmas) - 1, min(len(sigmas), FEW)).round().astype(int)]


def _langevin(sigmas: np.ndarray, own: np.ndarray, curvature: Callable | None) -> Plan:
    """At ``sigmas``, on the levels ``own`` of the model."""
    plan = annealed_langevin(sigmas)
    if curvature is not None and not _stable(plan, curvature):
        stiffest = float(np.max(1 + sigmas**2 * curvature(sigmas)))  # in units of 1/σ², where a step is step_lr/σ_L²
        plan = annealed_langevin(sigmas, step_lr=0.2 * sigmas[-1] ** 2 / stiffest, denoise=False)
    return plan.on_levels(own)


def _stable(plan: Plan, curvature: Callable) -> bool:
    try:
        refuse_divergence(plan, curvature(plan.sigma))
    except ValueError:
        return False
    return True
