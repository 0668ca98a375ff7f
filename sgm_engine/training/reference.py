"""``stable_target`` with further points of the data beside the batch, drawn anew at every step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgm_engine.checks import check_int
from sgm_engine.data.images import dequantise
from sgm_engine.keys import Key
from sgm_engine.training.objectives import stable_target

APART = 1 << 40  # where sample ids of the further points begin


class ReferenceBatch:
    """An objective (model, x, levels, key) → loss: stable_target over the batch x and ``size`` further images.

    images: uint8 [N, C, H, W], the whole training set. Each further image is any of them, drawn independently, with
    its own dequantisation and, if asked for, its own flip. So it may be one of the batch, as often as chance has it,
    and the target stays unbiased. A function of the key alone: a resumed run meets the same ones.
    """

    def __init__(self, images: np.ndarray, size: int, flip: bool = False, **options):
        self.images, self.size, self.flip, self.options = images, check_int("size", size, 1), flip, options

    def points(self, key: Key) -> Tensor:
        """float32 [size, C, H, W], for the batch whose samples are the key's."""
        first = int(key.sample_id[0]) // len(key.sample_id) * self.size
        own = Key(key.seed, APART + first + torch.arange(self.size))
        high, low = (own.uniform(torch.empty(self.size, 1, dtype=torch.float64), draw)[:, 0] for draw in (0, 1))
        index = ((high + low / 2**24) * len(self.images)).long().clamp(max=len(self.images) - 1)
        x = torch.from_numpy(self.images[index.numpy()])
        x = dequantise(x, own.uniform(x.float(), 2))
        mirrored = own.uniform(torch.empty(self.size, 1), 3)[:, 0] < 0.5
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x) if self.flip else x

    def __call__(self, model, x: Tensor, levels: Tensor, key: Key, **options) -> Tensor:
        reference = self.points(key).to(x.device)
        return stable_target(model, x, levels, key, reference=reference, **self.options | options)
