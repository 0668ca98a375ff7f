"""How likely data are: in one pass of a classifier, and by the probability flow of any score model."""

from __future__ import annotations

import math

from torch import Tensor


def bits_per_dim(log_prob: Tensor, dim: int, bins: float = 256) -> Tensor:
    """Bits a dimension of an image of grey levels: −log p/(d·ln 2) + log₂ bins, like log_prob (nats).

    bins: grey levels in a unit of x: 256 for pixels in [0, 1], 128 for [−1, 1] (log₂ 128 = 7).
    """
    return -log_prob / (dim * math.log(2)) + math.log2(bins)
