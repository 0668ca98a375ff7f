"""``sgm convert``: an original checkpoint → our .safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgm_engine.cli.console import DONE, bad_input


def register(commands) -> None:
    p = commands.add_parser("convert", help="a published .pth → .safetensors")
    p.description = (
        "Turn a .pth of NCSN or NCSNv2 into a .safetensors that says what it is. Nothing in the .pth is executed."
    )
    p.add_argument("source", metavar="OLD.pth")
    p.add_argument("target", metavar="NEW.safetensors")
    p.add_argument("--config", metavar="PATH", help="the config.yml that came with it")
    p.add_argument("--image-size", type=int, metavar="N", help="in pixels, where neither file nor config says it")
    p.add_argument("--sha256", metavar="HEX", help="digest that OLD.pth must have: finds any damage")
    p.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    p.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> int:
    with bad_input():
        from sgm_engine.checkpoints import checkpoint
        from sgm_engine.files.writing import check_writable

        check_writable(Path(args.target))
        options = {"config": args.config, "image_size": args.image_size, "ema": args.ema, "sha256": args.sha256}
        config = checkpoint.convert(args.source, args.target, **options)
    shape = f"{config.channels}×{config.image_size}×{config.image_size}"
    print(f"written: {args.target} ({config.architecture}, {shape}, ngf {config.ngf}, {len(config.sigmas)} levels)")
    return DONE
