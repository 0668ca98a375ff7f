"""A good plan for a number of evaluations, or for a quality by name: from the front that came with the weights, or by a
rule where none did."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from sgm_engine.plans.front import QUALITIES, Front, Point, started
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.samplers import SAMPLERS, levels_of_nfe
from sgm_engine.plans.schedule import SCHEDULES, check_count, check_sigmas, nearest_level
from sgm_engine.plans.steps import OF_PATH, options_in, path_of

BY_RULE = {"draft": 10, "good": 20, "best": 50}  # evaluations, where there is no front


def start_at(model: object, sigma: float) -> dict[str, object]:
    """Where chains of ``model`` begin at noise ``sigma``, as options of a sampler; {} where nothing is known: 0 + σ·N.

    Of the data's law that came with the weights; else as the family trained; else of σ_data, where that is known; else
    around the mean that the weights' own plan starts from.
    """
    if (law := getattr(model, "law", None)) is not None:
        return law.start(sigma)
    if hasattr(model, "start_at"):
        return model.start_at(sigma)
    options = getattr(model, "options", None)  # as_score's
    if isinstance(options, dict) and options.get("kind") == "edm":
        return {"start_scale": math.hypot(sigma, options["sigma_data"])}
    own = getattr(model, "plan", None) or {}
    return {"start_scale": sigma, "start_shift": own["start_shift"]} if "start_shift" in own else {}


def start_options(model: object, name: str, sigma: float) -> dict[str, object]:
    """The options of the sampler ``name`` that the model knows: its start, and those of the file's own sampler."""
    own = model.options_of(name, sigma) if hasattr(model, "options_of") else {}
    return own | started(name, start_at(model, sigma))


def good_plan(model, nfe: int | None = None, quality: str | None = None, between: bool = True, sigmas=None) -> Plan:
    """The best plan of at most ``nfe`` evaluations, or that of a ``quality``, for ``model``.

    quality: "draft", "good" or "best" of the front that came with the weights (plans/front.py); without one, a plan of
    10, 20 or 50 evaluations by a rule. Its sigmas may lie between the model's levels: ``conditioned(model, plan)`` is
    then what to run. between: False keeps to the levels. sigmas [L]: the levels of a model that does not say them.
    ValueError names the argument.
    """
    if (nfe is None) == (quality is None):
        raise ValueError("nfe or quality: pass one of them")
    if quality is None:
        check_count("nfe", nfe)
    elif quality not in QUALITIES:
        raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    levels = check_sigmas(model.sigmas if sigmas is None else sigmas)
    point = _point(getattr(model, "front", None), levels, nfe, quality, between)
    if point is not None:
        plan = point.plan(partial(start_at, model))
    else:
        plan = plan_by_rule(model, nfe or BY_RULE[quality], levels, between)
    return plan if between else plan.on_levels(levels)


def _point(front: Front | None, levels: np.ndarray, nfe, quality, between: bool) -> Point | None:
    if front is not None and not between:
        front = front.on_own_levels(levels)
    if front is None:
        return None
    return front.named(quality) if quality is not None else front.within(nfe)


def plan_by_rule(model, nfe: int, levels: np.ndarray, between: bool = True) -> Plan:
    """Without a front: ``good_sampler`` on Karras's schedule; of the levels themselves, at most ``nfe`` evaluations."""
    name = good_sampler(model, nfe)
    if between:
        return sampler_plan(model, name, nfe)
    if len(levels) < 2 or nfe < 2:
        raise ValueError(f"nfe: a plan of few steps takes at least 2 levels and 2 evaluations, got {nfe}")
    most = levels_of_nfe(name, nfe, {}) if name == "heun" else nfe
    path = SCHEDULES["karras"](levels[0], levels[-1], min(most, len(levels)))
    path = levels[np.unique(nearest_level(path, levels))]
    return SAMPLERS[name](path, **start_options(model, name, float(path[0])))


def sampler_plan(model, name: str, nfe: int, schedule: str | None = None, **options) -> Plan:
    """The sampler ``name`` in ``nfe`` evaluations, from the model's first sigma, begun at the data's law.

    schedule: one of SCHEDULES, to the model's last sigma. None steps as the front that came with the weights says of
    this sampler, its options under those given; else where the file's own sampler does; else on Karras's schedule.
    """
    rule = {} if schedule else getattr(getattr(model, "front", None), "steps", {}).get(name, {})
    options = options_in(rule) | options
    count = levels_of_nfe(name, nfe, options)
    if rule:
        sigmas, about = path_of(rule, float(model.sigmas[0]), count), {k: rule[k] for k in OF_PATH if k in rule}
    elif hasattr(model, "levels") and not schedule:
        sigmas, about = model.levels(count, own=name in ("ancestral", "ddim")), {"schedule": "the weights' own"}
    else:
        about = {"schedule": schedule or "karras"}
        sigmas = SCHEDULES[about["schedule"]](float(model.sigmas[0]), float(model.sigmas[-1]), count)
    plan = SAMPLERS[name](sigmas, **start_options(model, name, float(sigmas[0])) | options)
    return replace(plan, metadata=plan.metadata | about)


def good_sampler(model, nfe: int) -> str:
    """The sampler that the weights recommend, where it takes that many evaluations; else one of second order.

    With few evaluations the probability flow's DPM-Solver++(2M), then that of the diffusion, whose noise mends what the
    network gets wrong: from 20 evaluations on, of networks of discrete levels from 8 on.
    """
    own = (getattr(model, "plan", None) or {}).get("name")
    if own == "heun":
        return "heun" if nfe % 2 and nfe > 2 else "dpm_solver_2m"
    return "sde_dpm_solver_2m" if nfe >= (20 if hasattr(model, "levels") else 8) else "dpm_solver_2m"
