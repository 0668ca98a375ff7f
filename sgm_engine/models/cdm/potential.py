"""A classifier of noise levels whose gradient is a good denoiser: a Gaussian, and an inner product with the noise in u.

    f_t(u) = log N_t(u) + κ_t·Σ_m w_m(t)·⟨y(u), a_m(u)⟩ + b_t

log N_t: GaussianBase; y: the noise in u as that Gaussian sees it, in units of its σ; a_m: a convolutional network of
what NoiseFeatures makes; κ_t: the share of ε that the Gaussian misses. Were a linear in y and y = u/σ, the gradient of
⟨y, a⟩ would be 2·a/σ: so ``direct`` reads a denoiser off the same weights, which trains faster at half the cost a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.cdm.classes import NoiseClasses
from sgm_engine.models.cdm.gaussian import GaussianBase
from sgm_engine.numerics import unrounded

EMBEDDED, BASIS = 64, 16  # numbers that tell a layer the noise; smooth functions of a class that weigh the potentials
REACH = 3.0  # σ's from black or white at which a tanh plane still tells pixels apart
BIAS_RATE = 10.0  # Adam moves every weight alike; the biases have hundreds of nats to go


class Features(NamedTuple):
    """densities: float64 [N, T + 2]. z [N, D]. noise: y [N, C, H, W]. planes [N, 4·C, H, W]. embedded [N, E]."""

    densities: Tensor
    z: Tensor
    noise: Tensor
    planes: Tensor
    embedded: Tensor


class NoiseFeatures(nn.Module):
    """forward(u [N, C, H, W]) → Features.

    With p(t | u) of the Gaussian base, means over classes: the noise it sees, r = V·(H̄·Vᵀ(u − μ) − H̄m̄) with H the share
    of each variance that is noise; n̂ = exp E[log noise_t]. Planes: y = r/n̂; what is left, u − r; tanh of the distances
    from black and white in units of 3·n̂. No sin or cos: the Jacobian of such features is 2ⁿ·π.
    """

    def __init__(self, shape: tuple[int, int, int], classes: NoiseClasses, labels: int = 0):
        super().__init__()
        self.base = GaussianBase(math.prod(shape), classes)
        noise = np.maximum(classes.noise, classes.noise[1])  # data itself: as the least noise
        level = np.log(noise / np.hypot(classes.signal, noise))
        ends = np.log(classes.sigmas[[-1, 0]])
        place = np.log(np.clip(noise / np.maximum(classes.signal, 1e-30), *np.exp(ends)))
        self.place = (place - ends[0]) / max(ends[1] - ends[0], 1e-9)  # 0 … 1
        waves = [np.cos(np.pi * k * np.exp(level)) for k in range(6)]
        waves += [np.cos(np.pi * k * self.place) for k in (1, 2, 3)]
        tables = {"signal": classes.signal, "log_noise": np.log(noise), "waves": np.stack(waves, 1)}
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float64, device="cpu"), persistent=False)
        self.embed1, self.embed2 = linear(len(waves), EMBEDDED), linear(EMBEDDED, EMBEDDED)
        self.label = nn.Parameter(torch.zeros(labels + 1, EMBEDDED)) if labels else None  # the last row: no label

    def forward(self, u: Tensor, label: Tensor | None = None) -> Features:
        return self._of(u, label)

    @unrounded
    def _of(self, u: Tensor, label: Tensor | None) -> Features:
        base = self.base
        z = base.whiten(u if self.training else u.double())
        densities = base.log_densities(z)
        p = densities.softmax(1).to(z.dtype)
        noise = z * (p @ base.share.to(p.dtype).T) - p @ base.centre.to(p.dtype).T
        r = noise @ base.basis.to(z.dtype).T
        r = r.view_as(u)
        inverse = _image(torch.exp(-(p @ self.log_noise.to(p.dtype))))
        white = _image(p @ self.signal.to(p.dtype))
        y, left = (r * inverse).to(u.dtype), (u - r).to(u.dtype)
        near = [torch.tanh((u + sign * white) * (inverse / REACH)).to(u.dtype) for sign in (1, -1)]
        e = self.embed1((p @ self.waves.to(p.dtype)).to(u.dtype))
        e = F.silu(self.embed2(F.silu(e if self.label is None else e + self.label[label])))
        return Features(densities, z, y, torch.cat([y, left, *near], 1), e)


class Film(nn.Module):
    """forward(y [N, C, …], e [N, E]) → y·(1 + a(e)) + b(e), a and b [N, C] linear: what the noise makes of a layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = linear(EMBEDDED, 2 * channels, 0.1)

    def forward(self, y: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.linear(e).view(len(y), 2, -1, *[1] * (y.dim() - 2)).unbind(1)
        return y * (1 + scale) + shift


class Block(nn.Module):
    """h + conv(silu(film(conv(silu(h))))). Nothing is normalised: a norm's Jacobian would be the gradient's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.film = conv(channels, channels, 3, 1.4), Film(channels)
        self.conv2 = conv(channels, channels, 3, 0.5)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h + self.conv2(F.silu(self.film(self.conv1(F.silu(h)), e)))


class Mixing(nn.Module):
    """h + narrowed to ``narrow`` channels, all their pixels mixed through ``hidden`` numbers, widened again."""

    def __init__(self, channels: int, pixels: int, narrow: int, hidden: int):
        super().__init__()
        self.narrow, self.widen = conv(channels, narrow, 1), conv(narrow, channels, 1, 0.7)
        self.mix1, self.film = linear(narrow * pixels, hidden, 1.4), Film(hidden)
        self.mix2 = linear(hidden, narrow * pixels, 0.7)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        y = self.narrow(F.silu(h))
        mixed = self.mix2(F.silu(self.film(self.mix1(y.flatten(1)), e)))
        return h + self.widen(mixed.view_as(y))


class PotentialHead(nn.Module):
    """Weights w_m(t) of M potentials and biases b_t, as smooth functions of the class: rows of Gaussian bumps.

    w is multiplied by κ_t = √(share of the variance of ε that the Gaussian misses), 0 for the reference.
    bias [T + 2]: steps from class to class, a tenth of them; the reference's is 0 whatever they are.
    """

    def __init__(self, potentials: int, place: np.ndarray):
        super().__init__()
        bumps = np.exp(-0.5 * ((place[:, None] - np.linspace(0, 1, BASIS)) * (BASIS - 1)) ** 2)
        bumps = torch.tensor(bumps / bumps.sum(1, keepdims=True), dtype=torch.float64, device="cpu")
        self.register_buffer("bumps", bumps, persistent=False)
        self.weight = nn.Parameter(torch.randn(BASIS, potentials) * (0.1 / math.sqrt(potentials)))
        self.bias = nn.Parameter(torch.zeros(len(place)))

    def forward(self, inner: Tensor, missed: Tensor) -> Tensor:
        """Σ_m w_m(t)·inner_m + b_t [N, T + 2] of inner products [N, M]."""
        return self._sums(inner, missed)

    @unrounded
    def _sums(self, inner: Tensor, missed: Tensor) -> Tensor:
        return inner @ self.weights(missed).T + self.biases()

    @unrounded
    def weights(self, missed: Tensor) -> Tensor:
        """κ_t·w_m(t) [T + 2, M]."""
        kappa = missed.clamp(min=0).sqrt()
        kappa = torch.cat([kappa[1:2], kappa[1:-1], kappa.new_zeros(1)])
        return (kappa[:, None] * self.bumps).to(self.weight.dtype) @ self.weight

    def biases(self) -> Tensor:
        """b_t [T + 2]."""
        steps = BIAS_RATE * self.bias
        return torch.cat([steps[:-1].cumsum(0), steps.new_zeros(1)])

    @torch.no_grad()
    def add_biases(self, more: Tensor) -> None:
        """Add to b_t, t = 0 … T."""
        steps = torch.cat([more[:1], more.diff()]) / BIAS_RATE
        self.bias[:-1] += steps.to(self.bias.dtype)


class PotentialNet(nn.Module):
    """forward(u [N, C, H, W]) → logits [N, T + 2], float64 (H and W divide by 4).

    2×2 pixels are one position of ``width`` channels; a second resolution of half the positions a side, of width·
    multipliers[1], holds 2·blocks blocks, each with a Mixing (narrow, hidden); ``blocks`` before and behind it. With
    ``labels`` classes, forward and direct take label int64 [N], 0 … labels, the last one for none.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        classes: NoiseClasses,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        potentials: int = 12,
        mixing: Sequence[int] = (16, 256),
        labels: int = 0,
    ):
        super().__init__()
        size, (c, wide) = image_size // 2, (width * m for m in multipliers)
        self.potentials, self.labels = potentials, labels
        self.features = NoiseFeatures((channels, image_size, image_size), classes, labels)
        self.begin, self.place = conv(16 * channels, c), nn.Parameter(torch.zeros(1, c, size, size))
        self.before = nn.ModuleList(Block(c) for _ in range(blocks))
        self.down, self.place2 = conv(c, wide, stride=2), nn.Parameter(torch.zeros(1, wide, size // 2, size // 2))
        middle = [[Block(wide), Mixing(wide, (size // 2) ** 2, *mixing)] for _ in range(2 * blocks)]
        self.middle = nn.ModuleList(part for pair in middle for part in pair)
        self.up = conv(wide, c, gain=0.7)
        self.behind = nn.ModuleList(Block(c) for _ in range(blocks))
        self.end = conv(c, 4 * channels * potentials)
        self.head = PotentialHead(potentials, self.features.place)

    def forward(self, u: Tensor, label: Tensor | None = None) -> Tensor:
        found = self.features(u, label)
        a = self._fields(found)  # [N, M, 4·C, H/2, W/2]
        y = F.pixel_unshuffle(found.noise, 2)
        inner = (a * y[:, None]).flatten(2).sum(2)  # [N, M]
        return found.densities + self.head(inner, self._missed)

    def direct(self, u: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """E[ε | u, class t], like u, without a gradient in u: another model of the same weights, near ``forward``'s."""
        found = self.features(u, label)
        weights = -2 * self.head.weights(self._missed)[t]
        more = (self._fields(found) * weights[:, :, None, None, None]).sum(1)
        return self.features.base.noise_pred(found.z, t).to(u.dtype).view_as(u) + F.pixel_shuffle(more, 2)

    @property
    def _missed(self) -> Tensor:
        return self.features.base.missed

    def _fields(self, found: Features) -> Tensor:
        """a_m(u) [N, M, 4·C, H/2, W/2], 2×2 pixels as channels."""
        e = found.embedded
        h = self.begin(F.pixel_unshuffle(found.planes, 2)) + self.place
        for block in self.before:
            h = block(h, e)
        kept, h = h, self.down(F.silu(h)) + self.place2
        for part in self.middle:
            h = part(h, e)
        h = kept + self.up(F.silu(h).repeat_interleave(2, 2).repeat_interleave(2, 3))
        for block in self.behind:
            h = block(h, e)
        a = self.end(F.silu(h))
        return a.view(len(a), self.potentials, -1, *a.shape[2:])


def conv(c_in: int, c_out: int, kernel: int = 3, gain: float = 1.0, stride: int = 1) -> nn.Conv2d:
    """Weights of variance gain²/inputs, biases 0."""
    return _initialised(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2), gain)


def linear(c_in: int, c_out: int, gain: float = 1.0) -> nn.Linear:
    return _initialised(nn.Linear(c_in, c_out), gain)


def _initialised(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.normal_(layer.weight, 0, gain / math.sqrt(layer.weight[0].numel()))
    nn.init.zeros_(layer.bias)
    return layer


def _image(v: Tensor) -> Tensor:
    """[N] → [N, 1, 1, 1]."""
    return v.view(-1, 1, 1, 1)
