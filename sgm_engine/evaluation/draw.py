"""Samples of a plan as blocks of uint8 images: what the evaluation reads, no more of them in memory than a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import Divergence
from sgm_engine.plans.plan import Plan


def drawn(
    engine: Engine,
    plan: Plan,
    ids: Iterable[int],
    seed: int,
    lost: list[Divergence],
    size: int = 256,
    progress: bool = False,
    tell: Callable[[int], object] = lambda n: None,
) -> Iterator[Tensor]:
    """uint8 [b, C, H, W], b ≤ size, in the order of ids. lost: gets the samples that diverged, which are left out.
    tell: told of evaluations done, a sample at a time."""
    block: list[Tensor] = []
    for _, x in engine.stream(ids, seed, plan, progress=progress, on_diverged=lost.append):
        block.append(x.cpu())
        tell(plan.nfe)
        if len(block) == size:
            yield _bytes(block, engine)
            block = []
    if block:
        yield _bytes(block, engine)


def _bytes(block: list[Tensor], engine: Engine) -> Tensor:
    return torch.from_numpy(engine.pictures(torch.stack(block))).permute(0, 3, 1, 2).contiguous()
