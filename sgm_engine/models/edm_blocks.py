"""Blocks of EDM's U-Nets (arXiv 2206.00364, appendix F), with the names of its files. x is [N, C, H, W]."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.unet_blocks import attention, fir_down, fir_kernel, fir_up, group_norm

HALF = math.sqrt(0.5)


def conv(c_in: int, c_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


class ResampledConv(nn.Module):
    """k×k convolution, after resampling by ``taps``: mode is "up" or "down"; kernel 0 resamples only.

    fused: filter after the convolution instead, which is padded by the filter's reach too, and keep every second pixel.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, mode: str, taps=(1, 1), fused: bool = False):
        super().__init__()
        self.mode, self.fused = mode, fused
        if kernel:
            self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel) / math.sqrt(c_in * kernel**2))
            self.bias = nn.Parameter(torch.zeros(c_out))
        else:
            self.weight = None
        self.register_buffer("resample_filter", fir_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            kernel = self.resample_filter
            x = F.conv2d(x, self.weight, self.bias, padding=1 + (kernel.shape[-1] - 1) // 2)
            return F.conv2d(x, kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])
        x = (fir_up if self.mode == "up" else fir_down)(x, self.resample_filter)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class UNetBlock(nn.Module):
    """forward(x, emb). heads: of its attention, 0 for none. adaptive: GN(h)·(1 + scale) + shift, without ×√½."""

    def __init__(self, c_in, c_out, emb, heads=0, mode="same", taps=(1, 1), adaptive=False, dropout=0.0):
        super().__init__()
        eps = 1e-5 if adaptive else 1e-6
        self.heads, self.adaptive = heads, adaptive
        self.norm0 = group_norm(c_in, eps)
        self.conv0 = conv(c_in, c_out, 3) if mode == "same" else ResampledConv(c_in, c_out, 3, mode, taps)
        self.affine = nn.Linear(emb, c_out * (2 if adaptive else 1))
        self.norm1 = group_norm(c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = conv(c_out, c_out, 3)
        self.skip = None
        if mode != "same":
            self.skip = ResampledConv(c_in, c_out, 1 if c_in != c_out or not adaptive else 0, mode, taps)
        elif c_in != c_out:
            self.skip = conv(c_in, c_out, 1)
        if heads:
            self.norm2 = group_norm(c_out, eps)
            self.qkv = conv(c_out, 3 * c_out, 1)
            self.proj = conv(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(emb)[:, :, None, None]
        if self.adaptive:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (scale + 1) + shift
        else:
            h = self.norm1(h + told)
        h = self._add(x if self.skip is None else self.skip(x), self.conv1(self.dropout(F.silu(h))))
        if not self.heads:
            return h
        # Channels hold q, k and v of one feature side by side.
        qkv = self.qkv(self.norm2(h)).flatten(2).reshape(h.shape[0], self.heads, h.shape[1] // self.heads, 3, -1)
        q, k, v = qkv.unbind(3)
        return self._add(h, self.proj(attention(q, k, v).reshape(h.shape)))

    def _add(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h if self.adaptive else (x + h) * HALF
