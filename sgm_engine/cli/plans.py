"""``sgm plans``: the plans that came with a checkpoint, as a table and a picture. Heavy imports come late."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sgm_engine.cli.arguments import add_weights
from sgm_engine.cli.console import DONE, bad_input, shown


def register(commands) -> None:
    p = commands.add_parser("plans", help="the plans that came with a checkpoint, by network evaluations")
    p.description = "Print the front of plans that travels with a checkpoint, and where its chains start."
    p.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint of any family (default: bundled, MNIST)")
    add_weights(p.add_argument)
    p.add_argument("--picture", metavar="FILE.png", help="draw it there as well: evaluations against quality")
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=plans)


def plans(args: argparse.Namespace) -> int:
    with bad_input():
        from sgm_engine.cli.model import described, load_model, none_came, start_said
        from sgm_engine.files.writing import check_writable

        picture = args.picture and Path(args.picture).expanduser()
        if picture:
            if picture.suffix.lower() != ".png":
                raise ValueError(f"argument --picture: must end in .png, got {args.picture!r}")
            check_writable(picture)
        if args.model and args.checkpoint:
            raise ValueError(f"argument --checkpoint: {args.model} and {args.checkpoint} are two models: take one")
        args.checkpoint = args.model or args.checkpoint
        model = load_model(args)
        front = getattr(model, "front", None)
        if picture:
            from sgm_engine.tuning.front import plot_front

            if front is None:
                raise ValueError(f"argument --picture: {none_came(model)}")
            plot_front(front, picture)
    if args.json:
        found = front and json.loads(front.to_json())
        print(json.dumps({"front": found, "start": start_said(model)}, ensure_ascii=False))
    else:
        print("\n".join(map(shown, described(model).splitlines())))
        if picture:
            print(f"written: {picture}")
    return DONE
