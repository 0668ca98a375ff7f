"""A rewritten network against the user's own module: compared before it is used, and left out where that is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from sgm_engine.numerics import float32_math
from sgm_engine.rewriting.altered import in_training
from sgm_engine.rewriting.rewrite import Left

AS_WRITTEN: ContextVar[bool] = ContextVar("accelerated modules run their sources", default=False)
# Relative, float32, of the first call against the user's own module; a wrong rewrite is off by O(1). On a GPU cuDNN may
# take another algorithm for the one than for the other, Winograd's for one, and 70 layers add their roundings up.
AGREEMENT = {"cpu": 1e-5, "cuda": 1e-3}


@contextmanager
def as_written() -> Iterator[None]:
    """Every Accelerated that this thread calls inside runs the user's own module."""
    token = AS_WRITTEN.set(True)
    try:
        yield
    finally:
        AS_WRITTEN.reset(token)


def refuse_training(module: nn.Module) -> None:
    if name := in_training(module):
        raise ValueError(f"module: {name} is in training mode and draws or learns there: call module.eval() first")


def refuse_disagreement(network: nn.Module, source: nn.Module, x: Tensor, level: Tensor) -> None:
    """Raises Left unless both make the same of random images, to rounding."""
    random = torch.Generator(x.device).manual_seed(0)
    x = torch.rand(2, *x.shape[1:], generator=random, device=x.device, dtype=x.dtype)
    level = level[:1].expand(2).contiguous()
    with float32_math("ieee") if x.is_cuda else nullcontext():  # TensorFloat-32 rounds each of them in its own way
        ours, theirs = network(x, level).float(), source(x, level).float()
    difference = ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()
    if not difference <= AGREEMENT["cuda" if x.is_cuda else "cpu"]:
        raise Left(f"rewritten, it would differ by {difference:.1e}")
