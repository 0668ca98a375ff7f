"""Plans to try: families × schedules × spans of noise × step sizes, drawn at random from ranges that make sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sgm_engine.plans.front import Start, started
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.samplers import SAMPLERS
from sgm_engine.plans.schedule import SCHEDULES, check_sigmas, nearest_level

SPANS_BEGIN = (1.0, 0.6, 0.35)  # of the model's largest sigma
SPANS_END = (1.0, 2.0, 4.0, 8.0)  # of its smallest
TRIES = 60  # draws for each candidate wanted, before giving up


def around_zero(sigma: float) -> dict[str, float]:
    """σ·N(0, 1): the start where nothing is known of the data."""
    return {"start_scale": sigma, "start_shift": 0.0}


def _langevin(rng: np.random.Generator, sigmas: np.ndarray) -> dict[str, Any]:
    """α/σ² between 0.1 and 1.2: 2 diverges, and the bias of the variance is its quarter."""
    step = float(np.exp(rng.uniform(np.log(0.1), np.log(1.2))))
    return {"steps_per_level": int(rng.integers(1, 6)), "step_lr": step * float(sigmas[-1]) ** 2}


def _consistent(rng: np.random.Generator, sigmas: np.ndarray) -> dict[str, Any]:
    return {"steps_per_level": int(rng.integers(1, 5)), "eta": float(rng.uniform(0.5, 1.2))}


def _churned(rng: np.random.Generator, sigmas: np.ndarray) -> dict[str, Any]:
    """Noise is never raised above the first sigma, where the model may know no level."""
    return {"s_churn": float(rng.choice([0.0, 5.0, 10.0, 20.0, 40.0])), "s_tmax": 0.7 * float(sigmas[0])}


def _corrected(rng: np.random.Generator, sigmas: np.ndarray) -> dict[str, Any]:
    snr = float(np.exp(rng.uniform(np.log(0.05), np.log(0.4))))
    predictor = str(rng.choice(["reverse_diffusion", "ancestral"]))
    return {"corrector_steps": int(rng.integers(1, 3)), "snr": snr, "predictor": predictor}


def _noisy(rng: np.random.Generator, sigmas: np.ndarray) -> dict[str, Any]:
    return {"tau": float(rng.uniform(0.6, 2.0))}


def _nothing(rng: np.random.Generator, sigmas: np.ndarray) -> dict[str, Any]:
    return {}


FAMILIES: dict[str, Callable[[np.random.Generator, np.ndarray], dict[str, Any]]] = {
    "annealed_langevin": _langevin,
    "consistent_annealed": _consistent,
    "ancestral": _nothing,
    "ddim": _nothing,
    "euler": _churned,
    "heun": _churned,
    "dpm_solver_2m": _nothing,
    "sde_dpm_solver_2m": _nothing,
    "sa_solver": _noisy,
    "predictor_corrector": _corrected,
}


def draw_candidates(
    sigmas,
    budget: int,
    count: int,
    seed: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
    start: Start = around_zero,
    between: bool = True,
    least: int | None = None,
) -> list[Plan]:
    """``count`` different plans of at most ``budget`` evaluations for a model with levels ``sigmas`` [L].

    Evaluations are drawn log-uniformly between ``least``, an eighth of the budget, and the budget. Half of the
    schedules (all, without ``between``) keep to a subset of the model's own levels; the others want it conditioned
    between them (at_sigmas). start(σ): where chains begin at noise σ, as options of a sampler. metadata says what was
    drawn, its path the sigmas that a plan was made from.
    ValueError if the ranges hold no ``count`` plans.
    """
    sigmas = check_sigmas(sigmas)
    if unknown := [name for name in families if name not in FAMILIES]:
        raise ValueError(f"families must be of {', '.join(FAMILIES)}, got {', '.join(map(repr, unknown))}")
    if budget < 2 or count < 1:
        raise ValueError(f"budget must be at least 2 and count at least 1, got {budget} and {count}")
    rng, found = np.random.default_rng(seed), {}
    for _ in range(TRIES * count):
        plan = _draw(rng, sigmas, budget, families, start, between, least)
        if plan is not None:
            found.setdefault(plan.digest, plan)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"found only {len(found)} different plans within a budget of {budget}: ask for fewer candidates")


def _draw(rng, sigmas, budget, families, start, between, least) -> Plan | None:
    """One plan, or None where what was drawn cannot be had: too few rows, an eta out of range, a step that diverges."""
    family = str(rng.choice(list(families)))
    schedule, own_levels = str(rng.choice(list(SCHEDULES))), bool(rng.random() < 0.5) or not between
    begin = sigmas[nearest_level(rng.choice(SPANS_BEGIN) * sigmas[0], sigmas)]
    end = sigmas[nearest_level(rng.choice(SPANS_END) * sigmas[-1], sigmas)]
    least = max(2, budget // 8) if least is None else least
    wanted = min(int(np.exp(rng.uniform(np.log(least), np.log(budget + 1)))), budget)
    if not end < begin:
        return None
    options = FAMILIES[family](rng, np.array([begin, end])) | started(family, start(float(begin)))
    if not between and "s_churn" in options:
        options["s_churn"] = 0.0  # it raises the noise to sigmas between the levels
    most = len(sigmas) if own_levels else wanted
    for levels in range(min(most, wanted), 1, -1):
        path = SCHEDULES[schedule](begin, end, levels)
        if own_levels:
            path = sigmas[np.unique(nearest_level(path, sigmas))]
        try:
            plan = SAMPLERS[family](path, **options)
        except ValueError:
            return None
        if plan.sigma.max() > begin * (1 + 1e-6):
            return None
        if plan.nfe <= wanted:
            plan.metadata.update(schedule=schedule, sigmas=len(path), own_levels=own_levels)
            plan.metadata.update(sigma_max=float(begin), sigma_min=float(end), path=path.tolist())
            return plan
    return None
