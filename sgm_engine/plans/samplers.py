"""Samplers of few steps: probability flow, its higher orders, EDM's churn, predictor–corrector.

Each takes the sigmas [L] that it steps through, descending, and ends with the denoising row x + σ_L²·score. They need
not be a model's levels: ``Engine(at_sigmas(model, plan.sigmas))`` conditions on them, ``plan.on_levels(model.sigmas)``
takes the nearest levels. Below, σ → σ' is a step, D = x + σ²·score the denoised image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from sgm_engine.plans import plan as first
from sgm_engine.plans import schedule as schedules
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import Shift, Sigmas, check_number, check_shift, check_sigmas

MAX_CHURN = np.sqrt(2) - 1


def euler(
    sigmas: Sigmas,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
    start_scale: float | None = None,
    start_shift: Shift = 0.0,
) -> Plan:
    """The probability flow by Euler steps x + σ(σ − σ')·score, with EDM's churn (arXiv 2206.00364, algorithm 2).

    Where s_tmin ≤ σ ≤ s_tmax, churn raises the noise to σ̂ = σ·(1 + min(s_churn/L, √2 − 1)) before the step, by
    s_noise·√(σ̂² − σ²)·z. That is the noise of the row before (of the start, before the first): no evaluation.
    """
    sigmas = check_sigmas(sigmas)
    raised, noise, options = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    rows = [(s, 1.0, s * (s - after), n) for s, after, n in zip(raised, sigmas[1:], noise[1:], strict=False)]
    return _table("euler", rows, raised, noise, sigmas, start_scale, start_shift, options)


def heun(
    sigmas: Sigmas,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
    start_scale: float | None = None,
    start_shift: Shift = 0.0,
) -> Plan:
    """The probability flow by Heun's second-order steps (EDM, arXiv 2206.00364, algorithms 1 and 2), 2·L − 1 rows.

    Two rows a step: an Euler step to x_E that stores x + ½σ(σ − σ')·score, to which the second adds
    ½σ'(σ − σ')·score(x_E, σ'). Churn as in ``euler``.
    """
    sigmas = check_sigmas(sigmas)
    raised, noise, options = _churn(sigmas, s_churn, s_tmin, s_tmax, s_noise)
    rows = []
    for s, after, n in zip(raised, sigmas[1:], noise[1:], strict=False):
        rows.append((s, 1.0, s * (s - after), 0.0, 0.0, 1.0, s * (s - after) / 2))
        rows.append((after, 0.0, after * (s - after) / 2, n, 1.0))
    return _table("heun", rows, raised, noise, sigmas, start_scale, start_shift, options)


def dpm_solver_2m(sigmas: Sigmas, start_scale: float | None = None, start_shift: Shift = 0.0) -> Plan:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order from one evaluation a step and the D before it."""
    return _multistep("dpm_solver_2m", sigmas, 0.0, start_scale, start_shift)


def sde_dpm_solver_2m(sigmas: Sigmas, start_scale: float | None = None, start_shift: Shift = 0.0) -> Plan:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 5): the same for the reverse diffusion, with noise every step."""
    return _multistep("sde_dpm_solver_2m", sigmas, 1.0, start_scale, start_shift)


def sa_solver(sigmas: Sigmas, tau: float = 1.0, start_scale: float | None = None, start_shift: Shift = 0.0) -> Plan:
    """SA-Solver's predictor of two steps, its τ constant (arXiv 2309.05019, section 5.1).

    tau 0 is the probability flow, 1 the reverse diffusion; more than 1 forgets faster what the network got wrong. The
    line through the last two D is integrated exactly, where the 2M samplers take its value in the middle of the step.
    """
    tau = check_number("tau", tau)
    if not 0 <= tau < np.inf:
        raise ValueError(f"tau must be >= 0 and finite, got {tau}")
    return _multistep("sa_solver", sigmas, tau, start_scale, start_shift, {"tau": tau})


def predictor_corrector(
    sigmas: Sigmas,
    corrector_steps: int = 1,
    snr: float = 0.16,
    predictor: str = "reverse_diffusion",
    start_scale: float | None = None,
    start_shift: Shift = 0.0,
) -> Plan:
    """Predictor–corrector (arXiv 2011.13456, algorithm 1): after each step Langevin rows at the level reached.

    A corrector row is x + ε·score + √(2ε)·z with ε = 2·(snr/r)², r the root mean square of the sample's own score
    (an adaptive row). The published one averages norms over the batch, so that a sample depends on its neighbours, and
    takes the drawn ‖z‖; here it is √(C·H·W), what it is on average. predictor: "reverse_diffusion" or "ancestral".
    """
    sigmas = check_sigmas(sigmas)
    if corrector_steps != 0:
        schedules.check_count("corrector_steps", corrector_steps, len(sigmas))
    snr = check_number("snr", snr)
    if not 0 < snr < 1:
        raise ValueError(f"snr must lie between 0 and 1, got {snr}: the corrector's b/σ² is 2·snr²")
    if predictor not in ("reverse_diffusion", "ancestral"):
        raise ValueError(f"predictor must be 'reverse_diffusion' or 'ancestral', got {predictor!r}")
    rows = []
    for s, after in pairwise(sigmas):
        drop = s**2 - after**2
        noise = np.sqrt(drop) * (after / s if predictor == "ancestral" else 1.0)
        rows.append((s, 1.0, drop, noise))
        rows += [(after, 1.0, 2 * snr**2, 2 * snr, 0.0, 0.0, 0.0, 1.0)] * corrector_steps
    options = {"corrector_steps": corrector_steps, "snr": snr, "predictor": predictor}
    return _table("predictor_corrector", rows, sigmas, np.zeros(len(sigmas)), sigmas, start_scale, start_shift, options)


SAMPLERS: dict[str, Callable[..., Plan]] = {
    function.__name__: function
    for function in (
        first.annealed_langevin,
        first.consistent_annealed,
        first.reverse_diffusion,
        first.ancestral,
        first.ddim,
        euler,
        heun,
        dpm_solver_2m,
        sde_dpm_solver_2m,
        sa_solver,
        predictor_corrector,
    )
}


def plan_of_nfe(
    name: str, nfe: int, sigma_max: float, sigma_min: float, schedule: str = "karras", **options: Any
) -> Plan:
    """The sampler ``name`` with ``nfe`` network evaluations from sigma_max to sigma_min, units of x.

    schedule: one of schedule.SCHEDULES, of as many sigmas as the evaluations pay for; ``options`` are the sampler's
    own. ValueError where the number cannot be had exactly, with the nearest that can.
    """
    count = levels_of_nfe(name, nfe, options)
    if schedule not in schedules.SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(schedules.SCHEDULES)}, got {schedule!r}")
    return SAMPLERS[name](schedules.SCHEDULES[schedule](sigma_max, sigma_min, count), **options)


def levels_of_nfe(name: str, nfe: int, options: dict) -> int:
    """How many sigmas ``nfe`` evaluations of the sampler pay for; ValueError where there is no such number."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    check_options(name, options)
    schedules.check_count("nfe", nfe)
    each, fixed = _cost(name, options)
    levels, rest = divmod(nfe - fixed, each)
    if rest or levels < 2:
        low = max(levels, 2) * each + fixed
        near = f"{low} or {low + each}" if levels >= 2 else f"{low}"
        some = f"{each}·L{fixed:+d} evaluations, L ≥ 2" if fixed or each > 1 else "at least 2 evaluations"
        raise ValueError(f"nfe: {name} with these options takes {some}, not {nfe}; take {near}")
    return levels


def options_of(name: str) -> list[str]:
    """What the sampler ``name`` takes beside sigmas."""
    return [p for p in inspect.signature(SAMPLERS[name]).parameters if p != "sigmas"]


def check_options(name: str, options: Iterable[str]) -> None:
    """ValueError if the sampler ``name`` does not take one of these options."""
    known = options_of(name)
    if unknown := [option for option in options if option not in known]:
        others = ", ".join(other for other in SAMPLERS if {*unknown} <= {*options_of(other)})
        where = f" (taken by {others})" if others else ""
        raise ValueError(f"the plan {name} takes no {', '.join(unknown)}{where}; it takes: {', '.join(known)}")


def _cost(name: str, options: dict) -> tuple[int, int]:
    """Evaluations for L sigmas are each·L + fixed."""
    if "steps_per_level" in options:
        schedules.check_count("steps_per_level", options["steps_per_level"])
    if options.get("corrector_steps", 0) != 0:
        schedules.check_count("corrector_steps", options["corrector_steps"])
    if name == "annealed_langevin":
        return options.get("steps_per_level", 100), int(bool(options.get("denoise", True)))
    if name == "consistent_annealed":
        return options.get("steps_per_level", 1), 0
    if name == "predictor_corrector":
        steps = options.get("corrector_steps", 1)
        return 1 + steps, -steps
    return (2, -1) if name == "heun" else (1, 0)


def _churn(sigmas: Sigmas, s_churn, s_tmin, s_tmax, s_noise) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """σ̂ [L], the std [L] of the noise that raises each σ to it, and the options."""
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    options = {name: check_number(name, value) for name, value in options.items()}
    for name, value in options.items():
        if not value >= 0 or (name in ("s_churn", "s_noise") and not np.isfinite(value)):
            raise ValueError(f"{name} must be >= 0{'' if name.startswith('s_t') else ' and finite'}, got {value}")
    s_churn, s_tmin, s_tmax, s_noise = options.values()
    churned = (sigmas >= s_tmin) & (sigmas <= s_tmax)
    raised = sigmas * (1 + np.where(churned, min(s_churn / len(sigmas), MAX_CHURN), 0.0))
    return raised, s_noise * np.sqrt(raised**2 - sigmas**2), options


def _multistep(name: str, sigmas: Sigmas, tau: float, start_scale, start_shift, options: dict | None = None) -> Plan:
    """x' = keep·x + (1 − keep)·D + weight·(D − D before) + σ'·√(1 − k^(2τ²))·z, keep = k^(1+τ²), k = σ'/σ.

    options: of ``sa_solver``, whose weight is exact for a D that is linear in ln σ; without them that of 2M.
    """
    sigmas = check_sigmas(sigmas)
    k, power = sigmas[1:] / sigmas[:-1], 1 + tau**2
    h, keep = -np.log(k), k**power
    noise = sigmas[1:] * np.sqrt(1 - k ** (2 * tau**2))
    middle = (1 - keep) * h / 2 if options is None else h - (1 - keep) / power
    weight = np.append(0.0, middle[1:] / h[:-1])
    rows = []
    for i, new in enumerate(1 - keep + weight):
        sigma2 = sigmas[i] ** 2
        store = (1.0, sigma2) if i + 1 < len(k) else (0.0, 0.0)
        rows.append((sigmas[i], keep[i] + new, new * sigma2, noise[i], -weight[i], *store))
    return _table(name, rows, sigmas, np.zeros(len(sigmas)), sigmas, start_scale, start_shift, options or {})


def _table(name, rows, raised, noise, sigmas: Sigmas, start_scale, start_shift, options) -> Plan:
    """Rows (σ, a, b, c[, d, e, f, adaptive]) and the denoising row, from a start that holds the first churn."""
    rows = [*rows, (raised[-1], 1.0, raised[-1] ** 2, 0.0)]
    table = np.array([(*row, *(0.0,) * (8 - len(row))) for row in rows])
    sigma, a, b, c, d, e, f, adaptive = table.T
    level = np.searchsorted(-np.unique(sigma)[::-1], -sigma)
    scale = np.hypot(sigmas[0], noise[0]) if start_scale is None else start_scale
    options = {k: v if isinstance(v, str) or np.isfinite(v) else None for k, v in options.items()}
    start = {"start": "normal", "start_scale": check_number("start_scale", scale)}
    start["start_shift"] = check_shift("start_shift", start_shift)
    return Plan(level, sigma, a, b, c, d, **start, name=name, metadata=options, e=e, f=f, adaptive=adaptive)
