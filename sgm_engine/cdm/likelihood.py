"""What the likelihoods of images are compared with."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def auroc(positive: Tensor, negative: Tensor) -> float:
    """P(a positive's value > a negative's) + ½·P(equal), over all pairs: the area under the ROC curve."""
    both = torch.cat([positive.flatten(), negative.flatten()]).double().cpu().numpy()
    _, place, count = np.unique(both, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # ties share their mean rank
    n, m = positive.numel(), negative.numel()
    return float((rank[:n].sum() - n * (n + 1) / 2) / (n * m))


def pixel_gaussian_bits(train: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """(bits per dimension of ``test``, the floor) of independent Gaussians with the mean and variance that each pixel
    has in ``train``, the variances not below the floor that suits ``test`` best: no such model does better."""
    flat = train.reshape(len(train), -1)
    mean = (flat.mean(0, dtype=np.float64) + 0.5) / 256
    variance = flat.var(0, dtype=np.float64) / 256**2 + 1 / (12 * 256**2)
    x = test.reshape(len(test), -1)
    square = (((x + 0.5) / 256 - mean) ** 2).mean(0) + 1 / (12 * 256**2)  # of dequantised pixels
    floors = np.geomspace(1e-6, 0.1, 101)
    floored = np.maximum(variance, floors[:, None])
    nats = 0.5 * (np.log(2 * np.pi * floored) + square / floored).mean(1)
    best = int(nats.argmin())
    return float(nats[best] / math.log(2) + 8), float(floors[best])
