"""The averaged weights of a training run as a .safetensors that ``sgm sample --checkpoint`` takes.

python -m sgm_engine.training.export RUN/checkpoint.pt weights.safetensors --plan '{"name": "annealed_langevin", …}'
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from sgm_engine.bundled import plan_for
from sgm_engine.checkpoint import save_checkpoint
from sgm_engine.models.ncsn import NCSN


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sgm_engine.training.export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of sgm_engine.training.train")
    parser.add_argument("target", type=Path, help="the .safetensors to write")
    parser.add_argument(
        "--plan", type=json.loads, default=None, help="JSON: the plan to recommend, a name and its arguments"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float16")
    args = parser.parse_args(argv)
    run = torch.load(args.checkpoint, weights_only=True)
    model = NCSN(run["sigmas"], channels=1, ngf=run["ngf"], divide_by_sigma=True, image_size=28)
    model.load_state_dict(run["ema"])
    model.plan = args.plan
    plan_for(model)  # refuses a plan that the command could not use
    save_checkpoint(model, args.target, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
