"""Noise of a training step, from the engine's own generator (docs/noise.md), stream "train".

What a training sample meets is a function of (seed, sample id, draw, element) alone: not of the batch it is in, the
process, the number of processes or the step it was resumed at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM


@dataclass(frozen=True)
class Key:
    """The noise of a batch of N samples. seed: uint64. sample_id: int64 [N], in [0, 2^56). draw: the first one to use.

    Draws are numbered from there: ``normal(like, 2)`` is number ``draw`` + 2, and always the same.
    """

    seed: int
    sample_id: Tensor
    draw: int = 0

    def after(self, draws: int) -> Key:
        """The same samples, ``draws`` draws further on."""
        return replace(self, draw=self.draw + draws)

    def normal(self, like: Tensor, draw: int = 0) -> Tensor:
        """N(0, I) of the shape [N, …], dtype and device of ``like``; drawn in float32."""
        return self._fill(like, draw, "normal")

    def uniform(self, like: Tensor, draw: int = 0) -> Tensor:
        """U[0, 1), multiples of 2^-24, of the shape [N, …], dtype and device of ``like``."""
        return self._fill(like, draw, "uniform")

    def _fill(self, like: Tensor, draw: int, kind: str) -> Tensor:
        if len(like) != len(self.sample_id):
            raise ValueError(f"the key holds {len(self.sample_id)} sample ids, but the batch has {len(like)} samples")
        if like.numel() == 0:
            return torch.empty_like(like)
        # Elements count in [C, H, W] order; float32 whatever the default is, which a trainer in other precisions sets.
        out = torch.empty(len(like), 1, 1, like[0].numel(), dtype=torch.float32, device=like.device)
        sample_id = self.sample_id.to(like.device)
        seed = torch.full_like(sample_id, as_int64(self.seed))
        ops.noise_fill_(out, seed, sample_id, self.draw + draw, STREAM["train"], kind)
        return out.view(like.shape).to(like.dtype)


def as_int64(seed: int) -> int:
    """The int64 that has the bits of uint64 ``seed``."""
    return seed - 2**64 if seed >= 2**63 else seed


def to_device(values: list, device: torch.device) -> Tensor:
    """An int64 tensor on ``device``, sent without waiting for work that is queued there."""
    tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
