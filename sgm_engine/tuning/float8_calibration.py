"""The scales of precision="float8", from a short run of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sgm_engine.checks import check_int
from sgm_engine.engine.engine import Engine
from sgm_engine.plans.plan import Plan, consistent_annealed
from sgm_engine.plans.schedule import Sigmas
from sgm_engine.rewriting.float8.config import Float8Config, convolutions, nothing_to_do, qualifies

EVALUATIONS = 60  # of the run, or one a level if there are more levels


def calibrate_float8(
    model: nn.Module,
    n: int = 16,
    seed: int = 0,
    plan: Plan | None = None,
    device: torch.device | str | None = None,
    sigmas: Sigmas | None = None,
    shape: tuple[int, int, int] | None = None,
    **options: object,
) -> Float8Config:
    """Draw n samples in bfloat16 and keep the largest |input| of each convolution that "float8" would replace.

    plan: what the samples are drawn by. None: consistent annealed sampling through every level of the model, from the
        highest sigma to the lowest, each as often as makes about 60 evaluations; the noise in x is then exactly each
        level's sigma. A plan whose states differ from that (inpainting, guidance) is better calibrated by itself.
    seed: of the samples; take another one for those that are judged. device, sigmas, shape: as of Engine.
    options: margin, channels, emulate of the Float8Config that is returned.

    ValueError if no convolution qualifies, or one saw something that is not finite. The model is left as it is; changed
    weights are followed without a new calibration as long as activations keep their size (norms see to that in NCSN).
    docs/float8.md has the measured effect on samples.
    """
    n = check_int("n", n, 1)
    empty = Float8Config({}, **options)
    engine = Engine(model, min(n, 16), device, "bfloat16", "eager", sigmas, shape)
    if plan is None:
        plan = consistent_annealed(engine.sigmas, steps_per_level=max(1, EVALUATIONS // len(engine.sigmas)))
    network = engine._network
    copied = network.copied()  # its layers are watched
    watched, found = {}, convolutions(copied)
    for name, conv in found.items():
        if qualifies(conv, empty.channels):
            watched[name] = torch.zeros((), device=engine.device)
            conv.register_forward_pre_hook(_keep_largest(watched[name]))
    if not watched:
        raise nothing_to_do(len(found), empty.channels)
    engine.sample(n, seed, plan)
    maxima = {name: float(largest) for name, largest in watched.items() if largest != 0}
    levels = f"levels {plan.level.min()} to {plan.level.max()}"
    source = f"{n} samples of {plan.name}, {plan.nfe} evaluations, {levels}, seed {seed}"
    return replace(empty, maxima=maxima, source=source)


def _keep_largest(largest: Tensor) -> Callable:
    """A hook that raises ``largest``, in place and without waiting for the device; NaN stays."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        torch.maximum(largest, inputs[0].detach().abs().amax().float(), out=largest)

    return hook
