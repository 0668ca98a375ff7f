"""Train an NCSN on MNIST: denoising score matching, EMA, resume. ``python -m sgm_engine.training.train --help``."""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from sgm_engine.models.blocks import ConditionalInstanceNormPlus
from sgm_engine.models.ncsn import NCSN
from sgm_engine.training.data import dequantise, load_mnist
from sgm_engine.training.objectives import denoising_score_matching


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float) -> float:
    """Linear warm-up, a plateau, and a linear decay to 0 over the last ``decay`` share of the steps.

    The plateau does not depend on ``steps``, so a run may be resumed with another length.
    """
    remaining = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, (step + 1) / warmup, max(0.0, remaining))


@torch.no_grad()
def update_ema(average: dict[str, Tensor], model: nn.Module, step: int, decay: float) -> None:
    """average ← d·average + (1−d)·parameter with d = min(decay, (1 + step)/(10 + step)): short memory at the start."""
    d = min(decay, (1 + step) / (10 + step))
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter, 1 - d)


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sgm_engine.training.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint.pt and log.csv; resumed if it has them"
    )
    parser.add_argument("--ngf", type=int, default=32, help="base width of the network")
    parser.add_argument("--levels", type=int, default=12)
    parser.add_argument(
        "--sigma-begin", type=float, default=5.0, help="largest noise level, in units of the [0, 1] pixels"
    )
    parser.add_argument("--sigma-end", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate on the plateau")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--decay", type=float, default=0.25, help="share of the steps, at the end, that decay to 0")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args(argv)

    images = load_mnist(args.data)
    sigmas = torch.logspace(math.log10(args.sigma_begin), math.log10(args.sigma_end), args.levels)
    torch.manual_seed(args.seed)  # the script owns its process: the initial weights
    model = NCSN(sigmas, channels=1, ngf=args.ngf, divide_by_sigma=True).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99))
    ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = 0
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step = state["ema"], state["step"]
        print(f"resumed at step {step}", flush=True)

    # The norm is a chain of small memory-bound ops; compiled one by one they take seconds, the whole network minutes.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if isinstance(module, ConditionalInstanceNormPlus):
            module.compile(dynamic=False)

    running, began = 0.0, time.time()
    while step < args.steps:
        # One generator per step, so that a resumed run draws what an uninterrupted one would have drawn.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = torch.randint(len(images), (args.batch,), generator=generator)
        level = torch.randint(args.levels, (args.batch,), generator=generator)
        uniform = torch.rand(args.batch, *images.shape[1:], generator=generator)
        noise = torch.randn(args.batch, *images.shape[1:], generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup, args.decay)
        with torch.autocast("cpu", torch.bfloat16):
            loss = denoising_score_matching(model, dequantise(images[index], uniform), level, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1000.0)
        optimizer.step()
        step += 1
        update_ema(ema, model, step, args.ema)
        running += loss.item()
        if step % 50 == 0:
            rate = 50 * args.batch / (time.time() - began)
            with open(args.out / "log.csv", "a") as log:
                log.write(f"{step},{running / 50:.3f},{rate:.1f}\n")
            print(f"step {step}  loss {running / 50:.2f}  {rate:.0f} images/s", flush=True)
            running, began = 0.0, time.time()
        if step % args.save_every == 0 or step == args.steps:
            state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": step}
            save_atomically(state | {"sigmas": sigmas, "ngf": args.ngf}, checkpoint)


if __name__ == "__main__":
    main()
