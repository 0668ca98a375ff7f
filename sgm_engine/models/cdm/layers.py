"""The layers of a classifier's U-Net: DDPM's residual blocks, told a label or a noise level or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.kernels import ops
from sgm_engine.keys import Key


class Norm(nn.Module):
    """GroupNorm of at most 32 groups, γ and β, then SiLU: one kernel (in float64 PyTorch's own operations).

    least: channels of a group, where there are as many.
    """

    def __init__(self, channels: int, activation: str = "silu", eps: float = 1e-5, least: int = 1):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.groups, self.activation, self.eps = math.gcd(channels, min(32, max(channels // least, 1))), activation, eps

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.dtype == torch.float64:
            y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
            return F.silu(y) if self.activation == "silu" else y
        return ops.noise_conditioned_norm(
            x, self.weight, beta=self.bias, activation=self.activation, groups=self.groups, eps=self.eps
        )


class Dropout(nn.Module):
    """Zeroes ``share`` of a training sample's numbers, and scales the rest by 1/(1 − share).

    Which ones is a function of the training sample: ``key`` and ``draw``, which ``dropping`` sets for one loss. Without
    a key, or in evaluation mode, nothing is zeroed.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share, self.key, self.draw = float(share), None, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.share or self.key is None:
            return x
        kept = self.key.uniform(x.detach().float(), self.draw) >= self.share
        return x * (kept.to(x.dtype) / (1 - self.share))


@contextmanager
def dropping(network: nn.Module, key: Key) -> Iterator[None]:
    """The Dropout layers of ``network`` drop inside by draws ``key``, one each, in the order of its modules."""
    layers = [part for part in network.modules() if isinstance(part, Dropout)]
    for draw, layer in enumerate(layers):
        layer.key, layer.draw = key, draw
    try:
        yield
    finally:
        for layer in layers:
            layer.key = None


class Residual(nn.Module):
    """x + conv(drop(norm(conv(norm(x)) + told·SiLU(e)))), with a 1×1 convolution of x where the channels change.

    e [N, embedded]: what the network is told of the image; 0 embedded numbers: nothing. least: of the norm behind it,
    which would take a number for each channel out again if its groups were of one channel.
    """

    def __init__(
        self, c_in: int, c_out: int, embedded: int = 0, dropout: float = 0.0, eps: float = 1e-5, least: int = 1
    ):
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in, eps=eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.told = nn.Linear(embedded, c_out) if embedded else None
        self.norm2, self.conv2 = Norm(c_out, eps=eps, least=least), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.drop = Dropout(dropout)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = h if self.told is None else h + self.told(F.silu(e))[:, :, None, None]
        return self.skip(x) + self.conv2(self.drop(self.norm2(h)))


class Stage(nn.Sequential):
    """Residual blocks, which are told e, and attention."""

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        for part in self:
            x = part(x, e) if isinstance(part, Residual) else part(x)
        return x


class Downsample(nn.Conv2d):
    """Half the pixels a side by a 3×3 convolution; after: zeros are put after the last pixel alone, as DDPM does."""

    def __init__(self, channels: int, after: bool):
        super().__init__(channels, channels, 3, stride=2, padding=0 if after else 1)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.after else x)


class Told(nn.Module):
    """forward(label int64 [N] or None, t int64 [N] or None) → e [N, 4·width]: two linear layers of what is known.

    labels: a row each, and one for none. classes: rows of DDPM's sines of t, none where it is 0.
    """

    def __init__(self, width: int, labels: int, classes: int):
        super().__init__()
        self.label = nn.Embedding(labels + 1, width) if labels else None
        self.dense1, self.dense2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        if classes:
            half = max(width // 2, 2)
            angle = torch.arange(classes)[:, None] * torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
            waves = F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, max(width - 2 * half, 0)))[:, :width]
            self.register_buffer("waves", waves, persistent=False)

    def forward(self, label: Tensor | None, t: Tensor | None = None) -> Tensor:
        parts = [] if t is None else [self.waves[t]]
        parts += [] if self.label is None else [self.label(label)]
        return self.dense2(F.silu(self.dense1(sum(part.to(self.dense1.weight.dtype) for part in parts))))


class Attention(nn.Module):
    """x + attention over the pixels, one head. Written out: the fused one cannot be differentiated twice."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.norm, self.qkv = Norm(channels, "none", eps), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)  # [N, C, H·W] each
        weight = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(2)
        return x + self.out((v @ weight.transpose(1, 2)).view_as(x))


class Upsample(nn.Module):
    """To size×size pixels by nearest neighbours, then a 3×3 convolution."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size, self.conv = size, nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : self.size, : self.size]
        return self.conv(x)
