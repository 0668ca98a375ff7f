"""What the U-Nets of the diffusion families share: embeddings of the time, attention over pixels, resampling.

Plain functions of tensors, without parameters. x is [N, C, H, W]; told is [N], what the network is told of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm of min(32, C/4) groups, as score_sde and EDM choose them."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def frequencies(half: int, endpoint: float, device=None, theta: float = 10_000) -> Tensor:
    """theta^(−i/(half − endpoint)), i < half: those of transformers (arXiv 1706.03762), float32 [half]."""
    steps = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(steps * (-math.log(theta) / (half - endpoint)))


def sinusoids(angles: Tensor, cos_first: bool = False) -> Tensor:
    """angles [N, half] → [sin, cos], or [cos, sin], of them: [N, 2·half]."""
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if cos_first else [sin, cos], dim=1)


def positional(told: Tensor, width: int, endpoint: float, cos_first: bool = False, theta: float = 10_000) -> Tensor:
    """The embedding [N, width] of told, float32, by sines of geometric frequencies; width even."""
    angles = told.float()[:, None] * frequencies(width // 2, endpoint, told.device, theta)
    return sinusoids(angles, cos_first)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(qᵀk/√C)·v over pixels; q, k, v [N, heads, C, pixels] → the same shape."""
    found = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
    return found.transpose(2, 3)


def mean_2x2(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def nearest_2x(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def fir_kernel(taps: Sequence[float]) -> Tensor:
    """taps ⊗ taps, of sum 1: float32 [1, 1, k, k]."""
    row = torch.tensor(tuple(taps), dtype=torch.float32, device="cpu")
    outer = torch.outer(row, row)
    return (outer / outer.sum())[None, None]


def fir_down(x: Tensor, kernel: Tensor) -> Tensor:
    """Half the size: filtered by kernel [1, 1, k, k], every second pixel kept."""
    pad = (kernel.shape[-1] - 1) // 2
    if kernel.shape[-1] == 2:  # two equal taps
        return mean_2x2(x)
    return F.conv2d(x, kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, padding=pad, groups=x.shape[1])


def fir_up(x: Tensor, kernel: Tensor) -> Tensor:
    """Twice the size: zeros between the pixels, filtered by 4·kernel [1, 1, k, k]."""
    pad = (kernel.shape[-1] - 1) // 2
    if kernel.shape[-1] == 2:
        return nearest_2x(x)
    weight = (4 * kernel).to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=2, padding=pad, groups=x.shape[1])
