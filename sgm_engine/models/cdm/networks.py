"""Classifiers of noise levels: DDPM's U-Net without its time embedding, an MLP for points, and the head of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.cdm.classes import NoiseClasses
from sgm_engine.models.cdm.layers import Attention, Downsample, Norm, Residual, Stage, Told, Upsample


class Head(nn.Module):
    """forward(features [N, F], u [N, …]) → logits [N, T + 2]: the cumulative sum of a linear map, in float32 at least.

    A step from one class to the next is small and the logits of distant classes lie thousands apart, so the network
    gives the steps, zero at first. baseline (m, s): the classes' log densities if data were N(m, s²·I) are added, as
    EDM's preconditioning does for a denoiser: the untrained model is that Gaussian. None: nothing is added.
    """

    def __init__(self, features: int, classes: NoiseClasses, baseline: tuple[float, float] | None = None):
        super().__init__()
        count = classes.levels + 2
        self.weight = nn.Parameter(torch.zeros(count, features))  # no nn.Linear: autocast would take it for its own
        self.bias = nn.Parameter(torch.zeros(count))
        self.has_baseline = baseline is not None
        if baseline is not None:
            mean, std = baseline
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise ValueError(f"baseline must be (mean, std > 0), got {baseline}")
            mean = torch.tensor(mean * classes.signal, dtype=torch.float64, device="cpu")
            variance = torch.tensor(classes.signal**2 * std**2 + classes.noise**2, dtype=torch.float64, device="cpu")
            self.register_buffer("mean", mean, persistent=False)
            self.register_buffer("variance", variance, persistent=False)

    def forward(self, features: Tensor, u: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            f = F.linear(features, self.weight, self.bias).cumsum(1)
            return f + self.gaussian(u.to(f.dtype)) if self.has_baseline else f

    def gaussian(self, u: Tensor) -> Tensor:
        """log N(u; m·signal_t, s²·signal_t² + noise_t²) up to one constant for all classes [N, T + 2]."""
        mean, variance = self.mean.to(u.dtype), self.variance.to(u.dtype)
        u = u.flatten(1)
        d, total, square = u.shape[1], u.sum(1, keepdim=True), u.square().sum(1, keepdim=True)
        distance = square - 2 * mean * total + d * mean**2  # [N, T + 2]
        return -0.5 * (distance / variance + d * variance.log())


class MLP(nn.Module):
    """forward(u [N, …] of D elements) → logits [N, T + 2]: hidden SiLU layers and the head."""

    def __init__(self, dim: int, classes: NoiseClasses, width: int = 64, hidden: int = 3, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [dim, *[width] * hidden]
            layers = [[nn.Linear(a, b), nn.SiLU()] for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.head = Head(width, classes)

    def forward(self, u: Tensor) -> Tensor:
        return self.head(self.layers(u.flatten(1)), u)


class UNet(nn.Module):
    """forward(u [N, C, H, W]) → logits [N, T + 2]: DDPM's U-Net (arXiv 2006.11239, appendix B) without time embedding.

    width·multipliers: channels of each resolution, which halves from one to the next; ``blocks`` residual blocks in
    each on the way down, one more on the way up; attention after each block at resolutions of ``attention`` pixels and
    between the two of the middle. patch: pixels that one position of the first resolution covers, a side. fourier: the
    n of features sin and cos(2ⁿ·π·u) beside u (VDM, arXiv 2107.00630, appendix C): what small noise is seen by.
    labels: forward takes label int64 [N] too, 0 … labels, the last one for none. dropout: see layers.Dropout.
    denoiser: DDPM's own network, told t; it has ``direct`` in the place of logits. published: as the authors of CDM
    have it, ε 1e-6 in the norms, zeros after the last pixel where pixels halve, and the mean of the last layer as it
    is for the features.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        classes: NoiseClasses,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        patch: int = 1,
        fourier: Sequence[int] = (),
        features: int | None = None,
        baseline: tuple[float, float] | None = None,
        labels: int = 0,
        dropout: float = 0.0,
        denoiser: bool = False,
        published: bool = False,
    ):
        super().__init__()
        self.patch, self.fourier, self.labels, self.published = patch, tuple(fourier), labels, published
        self.told = Told(width, labels, classes.levels + 2 if denoiser else 0) if labels or denoiser else None
        self._made = (
            4 * width if self.told else 0,
            dropout,
            1e-6 if published else 1e-5,
            4 if self.told and not published else 1,
        )
        planes = channels * (1 + 2 * len(self.fourier)) * patch**2
        self.begin = nn.Conv2d(planes, width, 3, padding=1)
        size, c, widths = image_size // patch, width, [width]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(self._stage(c, c := width * multiplier, size in attention))
                widths.append(c)
            if i + 1 < len(multipliers):
                self.down.append(Downsample(c, published))
                widths.append(c)
                size = (size + 1) // 2
        self.middle = Stage(*self._stage(c, c, True), self._stage(c, c, False))
        sizes = [image_size // patch]
        for _ in multipliers[1:]:
            sizes.append((sizes[-1] + 1) // 2)
        for i, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(self._stage(c + widths.pop(), c := width * multiplier, sizes[i] in attention))
            if i:
                self.up.append(Upsample(c, sizes[i - 1]))
        features = channels * patch**2 if denoiser else 2 * width if features is None else features
        self.norm, self.end = Norm(c, eps=self._made[2]), nn.Conv2d(c, features, 3, padding=1)
        self.head = None if denoiser else Head(features, classes, baseline)

    def _stage(self, c_in: int, c_out: int, attention: bool) -> nn.Module:
        block = Residual(c_in, c_out, *self._made)
        return Stage(block, Attention(c_out, self._made[2])) if attention else block

    def forward(self, u: Tensor, label: Tensor | None = None) -> Tensor:
        if self.head is None:
            raise ValueError("this network only denoises: it has no logits")
        h = self._body(u, self.told(label) if self.told else None)
        if self.published:
            return self.head(h.mean((2, 3)), u)
        return self.head(F.silu(h).sum((2, 3)) / (h.shape[2] * h.shape[3]) ** 0.5, u)

    def direct(self, u: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """E[ε | u, class t], like u, of a denoiser."""
        if self.head is not None:
            raise ValueError("a UNet that classifies has no direct denoiser: take one of potentials, or denoiser=True")
        h = self._body(u, self.told(label, t))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h

    def _body(self, u: Tensor, e: Tensor | None) -> Tensor:
        waves = [wave(2**n * math.pi * u) for n in self.fourier for wave in (torch.sin, torch.cos)]
        h = torch.cat([u, *waves], 1) if waves else u
        h = self.begin(F.pixel_unshuffle(h, self.patch) if self.patch > 1 else h)
        kept = [h]
        for stage in self.down:
            h = stage(h) if isinstance(stage, Downsample) else stage(h, e)
            kept.append(h)
        h = self.middle(h, e)
        for stage in self.up:
            h = stage(h) if isinstance(stage, Upsample) else stage(torch.cat([h, kept.pop()], 1), e)
        return self.end(self.norm(h))
