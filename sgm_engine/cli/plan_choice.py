"""What ``sgm sample`` samples with: the plan of its arguments, and the model conditioned on it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn

from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.cli.arguments import PLAN_OPTIONS
from sgm_engine.files.reading import read_text
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.samplers import SAMPLERS, levels_of_nfe
from sgm_engine.plans.schedule import SCHEDULES


def chosen(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Plan]:
    """The model and the plan; ValueError names arguments that do not go together."""
    given = {name: getattr(args, name) for name in PLAN_OPTIONS if getattr(args, name) is not None}
    few = {name: getattr(args, name) for name in ("sampler", "nfe", "schedule") if getattr(args, name) is not None}
    if args.plan and args.plan.endswith(".json"):
        if given or few:
            raise ValueError(f"argument --plan: {args.plan} is complete, {_options(given | few)} cannot change it")
        return _conditioned(model, read_plan(args.plan), args.conditioning)
    if few or args.conditioning:
        if args.plan:
            raise ValueError(f"argument --plan: {args.plan} and {_options(few) or '--conditioning'} exclude each other")
        if args.conditioning and not (args.sampler or args.nfe):
            raise ValueError("argument --conditioning: goes with --sampler and --nfe, or with --plan FILE.json")
        if not args.nfe:
            raise ValueError("--sampler needs --nfe, the evaluations a sample: --sampler heun --nfe 35")
        name = args.sampler or good_sampler(model, args.nfe)
        count = levels_of_nfe(name, args.nfe, given)
        if hasattr(model, "levels") and not args.schedule:
            sigmas = model.levels(count, own=name in ("ancestral", "ddim"))  # where the file's own sampler steps
            schedule = "the weights' own"
        else:
            schedule = args.schedule or "karras"
            sigmas = SCHEDULES[schedule](float(model.sigmas[0]), float(model.sigmas[-1]), count)
        own = model.options_of(name, sigmas[0]) if hasattr(model, "options_of") else {}
        plan = SAMPLERS[name](sigmas, **own | given)
        plan = replace(plan, metadata=plan.metadata | {"schedule": schedule})
        return _conditioned(model, plan, args.conditioning)
    return model, plan_for(model, args.plan, **given)


def good_sampler(model: nn.Module, nfe: int) -> str:
    """For --nfe alone: the sampler that the weights recommend, where it takes that many; else one of second order.

    Below 20 evaluations the probability flow's DPM-Solver++(2M), from there on that of the diffusion, with noise.
    """
    own = (getattr(model, "plan", None) or {}).get("name")
    if own == "heun":
        return "heun" if nfe % 2 and nfe > 2 else "dpm_solver_2m"
    return "sde_dpm_solver_2m" if nfe >= 20 else "dpm_solver_2m"


def _conditioned(model: nn.Module, plan: Plan, conditioning: str | None) -> tuple[nn.Module, Plan]:
    if conditioning == "nearest":
        return model, plan.on_levels(model.sigmas)
    try:
        return at_sigmas(model, plan.sigmas), plan.on_levels(plan.sigmas)
    except ValueError as error:
        raise ValueError(f"{error}; --conditioning nearest takes the model's own levels") from None


def read_plan(path: str) -> Plan:
    """The plan in a file; ValueError says what is wrong with which."""
    try:
        return Plan.from_json(read_text(Path(path).expanduser()))
    except OSError as error:
        raise ValueError(f"argument --plan: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"argument --plan: {path}: {error}") from None


def _options(given: dict) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)
