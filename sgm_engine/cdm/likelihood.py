"""How likely images are under a classification diffusion model, in bits, and whether it tells them from others."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sgm_engine.cdm.model import CDM
from sgm_engine.training.data import dequantise
from sgm_engine.training.keys import Key


def bits_per_dim(log_prob: Tensor, dim: int, bins: float = 256) -> Tensor:
    """Bits a dimension of an image of grey levels: −log p/(d·ln 2) + log₂ bins, like log_prob (nats).

    bins: grey levels in a unit of x: 256 for pixels in [0, 1], 128 for [−1, 1] (log₂ 128 = 7).
    """
    return -log_prob / (dim * math.log(2)) + math.log2(bins)


@torch.no_grad()
def image_bits(model: CDM, images: np.ndarray, dequantised: bool = True, seed: int = 0, batch: int = 100) -> Tensor:
    """Bits per dimension of uint8 images [N, C, H, W] under a model of pixels in [0, 1], float64 [N]: one pass each.

    dequantised: at (x + U)/256, U uniform, whose mean bounds the bits of the discrete image from above if log p is a
    density; else at the middle of the pixel's interval, (x + ½)/256. U of image i is the noise of Key(seed, i).
    """
    device, found = model.sigmas.device, []
    for first in range(0, len(images), batch):
        x = torch.from_numpy(np.array(images[first : first + batch])).to(device)
        u = torch.full(x.shape, 0.5, device=device)
        if dequantised:
            u = Key(seed, torch.arange(first, first + len(x))).uniform(u)
        found.append(bits_per_dim(model.log_prob(dequantise(x, u)).double(), x[0].numel()).cpu())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


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
