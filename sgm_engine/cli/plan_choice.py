"""What ``sgm sample`` samples with: the plan of its arguments, and the model conditioned on it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn

from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.checkpoints.good_plan import good_plan, good_sampler, sampler_plan
from sgm_engine.cli.arguments import PLAN_OPTIONS
from sgm_engine.files.reading import read_text
from sgm_engine.models.conditioning import at_sigmas, conditioned
from sgm_engine.plans.plan import Plan


def chosen(model: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, Plan]:
    """The model and the plan; ValueError names arguments that do not go together."""
    given, few = _given(args, PLAN_OPTIONS), _given(args, ("quality", "sampler", "nfe", "schedule"))
    if args.plan and args.plan.endswith(".json"):
        if given or few:
            raise ValueError(f"argument --plan: {args.plan} is complete, {_options(given | few)} cannot change it")
        return _conditioned(model, read_plan(args.plan), args.conditioning)
    if few or args.conditioning:
        if args.plan:
            raise ValueError(f"argument --plan: {args.plan} and {_options(few) or '--conditioning'} exclude each other")
        if args.conditioning and not few:
            raise ValueError("argument --conditioning: goes with --sampler, --nfe, --quality or --plan FILE.json")
        return _of_few(model, args, given, few)
    return model, plan_for(model, args.plan, **given)


def as_begun(model: nn.Module, args: argparse.Namespace, begun: Plan) -> tuple[nn.Module, Plan]:
    """``chosen``, for a job that was begun with the plan ``begun``: that plan, where these arguments meant it then.

    What an argument leaves open may have come to be better known: the default, --nfe alone, where chains start. A job
    keeps the plan that it was begun with. Any other plan is what it is, and is refused as another job's.
    """
    found = chosen(model, args)
    if args.plan and args.plan.endswith(".json"):
        return found
    meant, few = [found], _given(args, ("quality", "sampler", "nfe", "schedule"))
    if not few and not args.plan:
        meant.append((model, plan_for(model, (getattr(model, "plan", None) or {}).get("name", "annealed_langevin"))))
    if args.nfe and not args.schedule:  # how a sampler steps where nothing says so: the front may say it by now
        names = (args.sampler,) if args.sampler else (good_sampler(model, args.nfe), "dpm_solver_2m")
        for name in dict.fromkeys(names):
            plan = _without_steps(model, name, args.nfe, _given(args, PLAN_OPTIONS))
            meant.append(_conditioned(model, plan, args.conditioning))
    law = {name: getattr(begun, name) for name in ("start", "start_scale", "start_shift")}
    same = (conditioned for conditioned, plan in meant if replace(plan, **law) == begun)
    return next(((conditioned, begun) for conditioned in same), found)


def _without_steps(model: nn.Module, name: str, nfe: int, given: dict) -> Plan:
    """``sampler_plan`` as of weights whose front says nothing of the sampler."""
    ruled = name in getattr(getattr(model, "front", None), "steps", {})
    return sampler_plan(model, name, nfe, "karras" if ruled else None, **given)


def _of_few(model: nn.Module, args: argparse.Namespace, given: dict, few: dict) -> tuple[nn.Module, Plan]:
    """Of --quality, of --nfe alone, or of --sampler with --nfe."""
    if args.quality and (rest := _options(given | {k: v for k, v in few.items() if k != "quality"})):
        raise ValueError(f"argument --quality: {args.quality} and {rest} exclude each other")
    if args.quality or (few.keys() == {"nfe"} and not given):
        plan = good_plan(model, args.nfe, args.quality)
        return _conditioned(model, plan, args.conditioning, conditioned)
    if not args.nfe:
        given = next(name for name in ("sampler", "schedule") if name in few)
        raise ValueError(f"argument --{given}: needs --nfe, the evaluations a sample: --sampler heun --nfe 35")
    plan = sampler_plan(model, args.sampler or good_sampler(model, args.nfe), args.nfe, args.schedule, **given)
    return _conditioned(model, plan, args.conditioning)


def at_own(model: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """The model at the plan's sigmas, also where these are levels of it: the digest of a job's weights is of that."""
    return at_sigmas(model, plan.sigmas), plan.on_levels(plan.sigmas)


def _conditioned(model: nn.Module, plan: Plan, conditioning: str | None, how=at_own) -> tuple[nn.Module, Plan]:
    if conditioning == "nearest":
        return model, plan.on_levels(model.sigmas)
    try:
        return how(model, plan)
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


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
