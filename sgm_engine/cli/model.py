"""From arguments to a model, its plan and its engine. What ``sgm sample``, ``eval`` and ``tune`` share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgm_engine.engine.engine import Engine
    from sgm_engine.plans.plan import Plan


def chosen_model(args: argparse.Namespace, begun: Plan | None = None):
    """(model, Plan, path of the weights, scales of float8 or None, what was loaded in words).

    begun: the plan of the job that is to go on.
    """
    from sgm_engine.cli.float8_choice import chosen_scales
    from sgm_engine.cli.plan_choice import as_begun, chosen

    model = load_model(args)
    conditioned, plan = chosen(model, args) if begun is None else as_begun(model, args, begun)
    scales = chosen_scales(args, model, device_of(args.device), args.out, args.quiet)
    return conditioned, plan, weights_path(args), scales, said(model)


def load_model(args: argparse.Namespace):
    """The module that --checkpoint and --config name, drawing the class that --class-labels names."""
    from sgm_engine.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(weights_path(args), args.config, **how_to_load(args))


def how_to_load(args: argparse.Namespace) -> dict[str, object]:
    """Options of load_checkpoint that were given."""
    named = {
        name: getattr(args, name) for name in ("image_size", "class_labels", "guidance", "ema", "data_range", "sigmas")
    }
    return {name: value for name, value in named.items() if value is not None}


def weights_path(args: argparse.Namespace) -> Path:
    from sgm_engine.checkpoints.bundled import bundled_path
    from sgm_engine.checkpoints.families import local
    from sgm_engine.checkpoints.torch_file import CheckpointError

    name = getattr(args, "weights", None)
    if args.checkpoint and name:
        raise ValueError(f"--weights {name} names bundled weights and --checkpoint a file: take one of the two")
    if args.checkpoint:
        try:
            return local(args.checkpoint)
        except CheckpointError as error:
            raise ValueError(f"argument --checkpoint: {args.checkpoint} {error}") from None
    return bundled_path() if name is None else bundled_path(name)


def said(model) -> str:
    """What was loaded, in one line: family, preconditioning, range, shape, class, averages or not, plan."""
    from sgm_engine.outputs.images import UNIT

    config, shape = model.config, "×".join(map(str, model.shape))
    averaged = {True: ", averaged", False: ", not averaged", None: ""}[getattr(model, "averaged", None)]
    if not hasattr(config, "preconditioning"):
        ngf = f", ngf {config.ngf}" if hasattr(config, "ngf") else ""
        low, high = getattr(model, "data_range", None) or UNIT
        of = "" if (low, high) == UNIT else f", of data in [{low:g}, {high:g}]"
        return f"{config.architecture}, {shape}{ngf}, {len(model.sigmas)} levels{_label(model)}{averaged}{of}"
    low, high = config.data_range
    label = "" if not config.classes else f", class {'none' if config.class_label is None else config.class_label}"
    return (
        f"{config.family} ({config.architecture}), {shape}{label}{averaged}, {config.preconditioning['name']}, trained "
        f"on [{low:g}, {high:g}], σ {config.sigma_max:.4g} → {config.sigma_min:.2g}, "
        f"{config.plan['name']} of {config.plan['nfe']}"
    )


def _label(model) -> str:
    """Class and guidance of a network with labels."""
    if not getattr(model, "labels", 0):
        return ""
    return f", class {'any' if model.class_label is None else model.class_label}, guidance {model.guidance:g}"


def described(model) -> str:
    """The front as a table, or what is done without one; and where chains start."""
    front = getattr(model, "front", None)
    return f"{front.table() if front is not None else none_came(model)}\nstart: {start_said(model)}"


def none_came(model) -> str:
    from sgm_engine.checkpoints.bundled import plan_for
    from sgm_engine.checkpoints.good_plan import BY_RULE
    from sgm_engine.models.cdm.model import CDM

    plan = plan_for(model)
    rule = ", ".join(f"{quality} {nfe}" for quality, nfe in BY_RULE.items())
    own = " (both with --conditioning nearest: it knows its levels alone)" if isinstance(model, CDM) else ""
    return (
        f"no front of plans came with these weights: the default is {plan.name} of {plan.nfe} evaluations, --nfe N a "
        f"second-order sampler by rule, --quality that of {rule}{own}; `sgm tune --write` puts a front into a file"
    )


def start_said(model) -> str:
    """Where chains start, and whether that was measured or is assumed."""
    from sgm_engine.checkpoints.good_plan import start_at

    if (law := getattr(model, "law", None)) is not None:
        return f"from the data's law, which came with the weights: {law}"
    sigma = float(model.sigmas[0])
    start = {"start_shift": 0.0, "start_scale": sigma} | start_at(model, sigma)
    said = f"{start['start_shift']:g} + {start['start_scale']:.6g}·N(0, 1)"
    return f"{said}, assumed: no law of the data came with the weights"


def assumed(model) -> str:
    """What is added to a plan's start where the file does not say how its data are distributed."""
    known = getattr(model, "law", None) is not None or hasattr(model, "start_at")
    return "" if known else ", assumed: no law of the data came with the weights"


def engines(args: argparse.Namespace, model) -> Callable[[object], Engine]:
    """model → Engine as the arguments of ``add_engine`` say, for ``model`` and for what conditions it otherwise."""
    from sgm_engine.engine.engine import Engine

    options = engine_options(args, model) | {"device": device_of(args.device)}
    return lambda model: Engine(model, **options)


def engine_options(args: argparse.Namespace, model) -> dict[str, object]:
    """Options of Engine, the device as it was named."""
    from sgm_engine.cli.float8_choice import chosen_scales

    float8 = chosen_scales(args, model, device_of(args.device))
    options = {name: getattr(args, name) for name in ("batch", "device", "precision", "executor")}
    return options | {"float8": float8}


def load_plan(text: str | None, model, nfe: int | None = None, quality: str | None = None):
    """The plan in a JSON file, or the one of that name; the best of at most ``nfe`` evaluations, or of a ``quality``;
    else what the model's weights recommend."""
    from sgm_engine.checkpoints.bundled import plan_for
    from sgm_engine.cli.plan_choice import read_plan

    if nfe is not None or quality is not None:
        from sgm_engine.checkpoints.good_plan import good_plan

        if text is not None:
            raise ValueError(f"argument --plan: {text} and --{'quality' if nfe is None else 'nfe'} exclude each other")
        return good_plan(model, nfe, quality)
    if text is not None and (text.endswith(".json") or Path(text).is_file()):
        return read_plan(text)
    return plan_for(model, text)


def device_of(name: str) -> str:
    """--device as PyTorch names it: the GPU of this process where torchrun started several."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdecimal() and torch.cuda.is_available() else "cuda"


def processor(device) -> str:
    """The processor behind a torch device, in words."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    from sgm_engine import _C

    return f"{device.type} ({_C.isa()}, {_C.num_threads()} threads)"
