"""``sgm plans``: the plans that came with a checkpoint, as a table and a picture. Heavy imports come late."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sgm_engine.cli.arguments import at_least
from sgm_engine.cli.console import DONE, bad_input, shown


def register(commands) -> None:
    p = commands.add_parser("plans", help="the plans that came with a checkpoint, by network evaluations")
    p.description = "Print the front of plans that travels with a checkpoint, and where its chains start."
    p.add_argument(
        "checkpoint", nargs="?", metavar="MODEL", help="a checkpoint of any family (default: bundled, MNIST)"
    )
    p.add_argument("--config", metavar="PATH", help="what came with it")
    p.add_argument("--image-size", type=at_least(1), metavar="N", help="in pixels, where neither says it")
    p.add_argument("--picture", metavar="FILE.png", help="draw it there as well: evaluations against quality")
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=plans, class_labels=None)


def plans(args: argparse.Namespace) -> int:
    with bad_input():
        from sgm_engine.cli.model import load_model
        from sgm_engine.files.writing import check_writable

        picture = args.picture and Path(args.picture).expanduser()
        if picture:
            check_writable(picture)
        model = load_model(args)
        if picture:
            from sgm_engine.tuning.front import plot_front

            if model.front is None:
                raise ValueError(f"argument --picture: {none_came(model)}")
            plot_front(model.front, picture)
    if args.json:
        found = model.front and json.loads(model.front.to_json())
        print(json.dumps({"front": found, "start": start_said(model)}, ensure_ascii=False))
    else:
        print("\n".join(map(shown, described(model).splitlines())))
        if picture:
            print(f"written: {picture}")
    return DONE


def described(model) -> str:
    """The front as a table, or what is done without one; and where chains start."""
    front = getattr(model, "front", None)
    return f"{front.table() if front is not None else none_came(model)}\nstart: {start_said(model)}"


def none_came(model) -> str:
    from sgm_engine.checkpoints.bundled import plan_for
    from sgm_engine.checkpoints.good_plan import BY_RULE

    plan = plan_for(model)
    rule = ", ".join(f"{quality} {nfe}" for quality, nfe in BY_RULE.items())
    return (
        f"no front of plans came with these weights: the default is {plan.name} of {plan.nfe} evaluations, --nfe N a "
        f"second-order sampler by rule, --quality that of {rule}; `sgm tune --write` puts a front into a file"
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
