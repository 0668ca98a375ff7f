"""Blocks of NCSN++ and DDPM++ (arXiv 2011.13456, appendix H), named as in its checkpoints. x is [N, C, H, W]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.unet_blocks import attention, fir_down, fir_kernel, fir_up, group_norm, nearest_2x, sinusoids

EPS = 1e-6
HALF = math.sqrt(0.5)


class Fourier(nn.Module):
    """ln σ [N] → [sin, cos](2π·W·ln σ); W is drawn once and never trained."""

    def __init__(self, half: int, scale: float = 16.0):
        super().__init__()
        self.W = nn.Parameter(torch.randn(half) * scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return sinusoids(x[:, None] * self.W * (2 * math.pi))


class Resample(nn.Module):
    """Twice or half the size by the filter ``taps``; its kernel is no part of a checkpoint."""

    def __init__(self, taps: Sequence[float]):
        super().__init__()
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)

    def down(self, x: Tensor) -> Tensor:
        return fir_down(x, self.kernel)

    def up(self, x: Tensor) -> Tensor:
        return fir_up(x, self.kernel)


class Down(nn.Module):
    """Half the size. With a filter: filtered, then a convolution of stride 2 without padding; else DDPM's own."""

    def __init__(self, c_in: int, fir: bool, taps: Sequence[float], conv: bool, c_out: int | None = None):
        super().__init__()
        self.fir, self.conv = fir, conv
        if conv:
            self.add_module("Conv2d_0" if fir else "Conv_0", nn.Conv2d(c_in, c_out or c_in, 3, stride=2))
        self.register_buffer("kernel", fir_kernel(taps if fir else (1, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.conv:
            return fir_down(x, self.kernel)
        if not self.fir:
            return self.Conv_0(F.pad(x, (0, 1, 0, 1)))
        size, channels = self.kernel.shape[-1], x.shape[1]  # pads: the filter's size, and 3 − 1 of the convolution
        weight = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        low, high = (size + 1) // 2, size // 2
        return self.Conv2d_0(F.conv2d(F.pad(x, (low, high, low, high)), weight, groups=channels))


class Up(nn.Module):
    """Twice the size. With a filter: a transposed convolution, then filtered; else nearest, then a convolution."""

    def __init__(self, c_in: int, fir: bool, taps: Sequence[float], conv: bool, c_out: int | None = None):
        super().__init__()
        self.fir, self.conv = fir, conv
        if conv:
            self.add_module("Conv2d_0" if fir else "Conv_0", nn.Conv2d(c_in, c_out or c_in, 3, padding=1))
        self.register_buffer("kernel", fir_kernel(taps if fir else (1, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fir:
            return self.Conv_0(nearest_2x(x)) if self.conv else nearest_2x(x)
        if not self.conv:
            return fir_up(x, self.kernel)
        conv = self.Conv2d_0
        h = F.conv_transpose2d(x, conv.weight.flip(2, 3).transpose(0, 1), stride=2)  # 2·H + 1
        weight = (4 * self.kernel).to(x.dtype).expand(h.shape[1], -1, -1, -1)
        pad = (self.kernel.shape[-1] - 2) // 2
        h = F.conv2d(h, weight, padding=pad, groups=h.shape[1])
        return h + conv.bias[:, None, None]


class Combine(nn.Module):
    """conv1×1(pyramid) + h, or both stacked as channels."""

    def __init__(self, c_in: int, c_out: int, method: str):
        super().__init__()
        self.method = method
        self.Conv_0 = nn.Conv2d(c_in, c_out, 1)

    def forward(self, pyramid: Tensor, h: Tensor) -> Tensor:
        found = self.Conv_0(pyramid)
        return found + h if self.method == "sum" else torch.cat([found, h], dim=1)


class NIN(nn.Module):
    """A 1×1 convolution whose weight W is [in, out]."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(c_in, c_out) / math.sqrt(c_in))
        self.b = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W.t()[:, :, None, None], self.b)


class Attention(nn.Module):
    """One head over all pixels: (x + NIN_3(attention of NIN_0…2(GN(x))))/√2."""

    def __init__(self, channels: int, skip_rescale: bool):
        super().__init__()
        self.GroupNorm_0 = group_norm(channels, EPS)
        for i in range(4):
            self.add_module(f"NIN_{i}", NIN(channels, channels))
        self.skip_rescale = skip_rescale

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (nin(h).flatten(2)[:, None] for nin in (self.NIN_0, self.NIN_1, self.NIN_2))
        h = x + self.NIN_3(attention(q, k, v).reshape(x.shape))
        return h * HALF if self.skip_rescale else h


class ResBlock(nn.Module):
    """forward(x, SiLU(emb) [N, 4·nf]). mode: "same", "down" or "up". ddpm: shortcut ``NIN_0`` for ``Conv_2``."""

    def __init__(self, c_in: int, c_out: int, emb: int | None, mode: str, taps, skip_rescale, ddpm, dropout: float):
        super().__init__()
        self.GroupNorm_0 = group_norm(c_in, EPS)
        self.Conv_0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.Dense_0 = nn.Linear(emb, c_out) if emb else None
        self.GroupNorm_1 = group_norm(c_out, EPS)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = None
        if c_in != c_out or mode != "same":
            self.shortcut = "NIN_0" if ddpm else "Conv_2"
            self.add_module(self.shortcut, NIN(c_in, c_out) if ddpm else nn.Conv2d(c_in, c_out, 1))
        self.mode, self.skip_rescale = mode, skip_rescale
        self.resample = Resample(taps) if taps else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.GroupNorm_0(x))
        if self.mode == "down":
            h, x = self.resample.down(h), self.resample.down(x)
        elif self.mode == "up":
            h, x = self.resample.up(h), self.resample.up(x)
        h = self.Conv_0(h)
        if self.Dense_0 is not None:
            h = h + self.Dense_0(emb)[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(F.silu(self.GroupNorm_1(h))))
        x = self._modules[self.shortcut](x) if self.shortcut else x
        return (x + h) * HALF if self.skip_rescale else x + h
