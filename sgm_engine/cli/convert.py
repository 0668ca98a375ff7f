"""``sgm convert``: a checkpoint of any family → our .safetensors, or a diffusers folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgm_engine.cli.arguments import at_least, levels, number
from sgm_engine.cli.console import DONE, bad_input
from sgm_engine.cli.model import said


def register(commands) -> None:
    p = commands.add_parser("convert", help="a checkpoint of any family → .safetensors, or a diffusers folder")
    p.description = (
        "Turn a checkpoint into a .safetensors that says what it is; a UNet2DModel also into a diffusers FOLDER/.\n"
        "Nothing in the source is executed."
    )
    p.add_argument("source", metavar="OLD", help="a file, a diffusers folder, or hf:owner/name")
    p.add_argument("target", metavar="NEW.safetensors")
    p.add_argument(
        "--config", metavar="PATH", help="what came with it: config.yml, score_sde's config .py, ADM's flags"
    )
    p.add_argument(
        "--image-size", type=at_least(1), metavar="N", help="in pixels, where neither file nor config says it"
    )
    p.add_argument("--sigmas", type=levels, metavar="A,B,…",
        help="noise levels, descending, where neither file nor config says them")  # fmt: skip
    p.add_argument("--data-range", type=number, nargs=2, metavar=("LOW", "HIGH"),
        help="of the data that it was trained on, where the file does not say it: -1 1")  # fmt: skip
    p.add_argument("--sha256", metavar="HEX", help="digest that OLD.pth must have: finds any damage")
    p.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    p.set_defaults(run=convert)


def convert(args: argparse.Namespace) -> int:
    with bad_input():
        from sgm_engine.checkpoints.checkpoint import load_checkpoint, save_as
        from sgm_engine.files.storage import is_url
        from sgm_engine.files.writing import check_writable

        if is_url(args.target):
            raise ValueError(f"cannot write {args.target}: a model goes to a disk")
        if Path(args.target).suffix:
            check_writable(Path(args.target))
        options = {"config": args.config, "image_size": args.image_size, "ema": args.ema, "sha256": args.sha256}
        options |= {"data_range": args.data_range, "sigmas": args.sigmas}
        model = load_checkpoint(args.source, **options)
        save_as(model, args.target)
    print(f"written: {args.target} ({said(model)})")
    return DONE
