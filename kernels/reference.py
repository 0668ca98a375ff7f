"""The mathematics of every op in plain torch, for float32 and float64; every backend is tested against this file."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sgm_engine.kernels.noise import fill

E4M3_MAX = 448.0  # the largest float8 e4m3 (OCP 8-bit floating point, revision 1.0)
ACTIVATIONS = {"none": lambda x: x, "elu": F.elu, "relu": F.relu, "silu": F.silu}


def noise_conditioned_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    level: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    eps: float = 1e-5,
    groups: int | None = None,
    before: str = "none",
    pool: bool = False,
    bias: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(γ·(x̂ + α·ms) + β), InstanceNorm++ with the noise level's own γ, α, β (NCSN, arXiv 1907.05600, appendix A).

    x: [N, C, H, W]. gamma, alpha, beta: [C], or [L, C] gathered by ``level`` [N]; None leaves the term out, so that
    alpha=None is InstanceNorm. residual: like x; the norm is then of x + residual, and (y, x + residual) is returned.
    before: the norm is of before(x + residual), which is then returned beside y. pool: y is its 5×5 mean, stride 1,
    padding counted as zeros (chained residual pooling, arXiv 1611.06612).
    groups: x̂ is over the pixels of all channels of a group (GroupNorm, arXiv 1803.08494); it divides C, alpha is None.
    bias, residual_bias: [C], added to x and to residual before all else.
    """
    x = ACTIVATIONS[before](summed(x, residual, bias, residual_bias))
    gamma, alpha, beta = (_per_sample(p, level) for p in (gamma, alpha, beta))
    n, c, h, w = x.shape
    part = x if groups is None else x.reshape(n, groups, c // groups * h, w)
    mean = part.mean((2, 3), keepdim=True)  # [N, C or groups, 1, 1]
    centred = part - mean
    y = centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + eps)  # biased variance
    y = y.reshape(x.shape)
    if alpha is not None:
        spread = mean - mean.mean(1, keepdim=True)
        variance = spread.square().sum(1, keepdim=True) / (x.shape[1] - 1)  # unbiased over C
        y = y + alpha * (spread * torch.rsqrt(variance + 1e-5))
    if gamma is not None:
        y = y * gamma
    if beta is not None:
        y = y + beta
    y = ACTIVATIONS[activation](y)
    if pool:
        y = F.avg_pool2d(y, 5, stride=1, padding=2)
    return y if residual is None and before == "none" else (y, x)


def summed(x: Tensor, residual: Tensor | None, bias: Tensor | None, residual_bias: Tensor | None) -> Tensor:
    """x + residual + bias + residual_bias, of images and vectors [C], those that there are."""
    x = x if residual is None else x + residual
    for vector in (bias, residual_bias):
        x = x if vector is None else x + vector[:, None, None]
    return x


def _per_sample(p: Tensor | None, level: Tensor | None) -> Tensor | None:
    """[C] → [1, C, 1, 1]; [L, C] and level [N] → [N, C, 1, 1]."""
    if p is None:
        return None
    return p[None, :, None, None] if p.dim() == 1 else p[level][:, :, None, None]


def quantised(x: Tensor, inverse: float) -> Tensor:
    """x·inverse as float8 e4m3: to the nearest, ties to even, at most ±448; NaN stays NaN. inverse: a float32."""
    return (x.float() * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def float8_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    inverse: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dilation: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale·(q(x) ∗ weight) + bias + residual in ``dtype``, stride 1, padding that keeps the size.

    x: [N, Cin, H, W], of which q(x) = quantised(x, inverse), or float8 already; weight: float8 [Cout, Cin, k, k];
    scale: [Cout], what one unit of q(x)·weight is worth; bias: [Cout]; residual: [N, Cout, H, W].
    """
    x = x if x.dtype == torch.float8_e4m3fn else quantised(x, inverse)
    y = F.conv2d(x.to(dtype), weight.to(dtype), padding=weight.shape[-1] // 2 * dilation, dilation=dilation)
    y = y * scale.to(dtype)[:, None, None]
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return y if residual is None else y + residual.to(dtype)


def langevin_update(
    x: Tensor,
    score: Tensor,
    coef: Tensor,
    row: Tensor,
    z: Tensor,
    previous: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """a·x + b·score + c·z + d·previous with (a, b, c, d) = coef[row]: one row of a plan, for each sample its own.

    x, score, z, previous: [B, C, H, W]; coef: [R, 4]; row: int64 [B]. A term whose c or d is 0 is left
    out, as z and previous may then be anything; a and b always count, so that a NaN of x or score stays one.
    gain: [B]; b is then b·gain², c is c·gain: steps measured by the size of the sample's score.
    """
    a, b, c, d = coef[row].to(x.dtype).T[..., None, None, None]  # [B, 1, 1, 1]
    if gain is not None:
        gain = gain.to(x.dtype)[:, None, None, None]
        b, c = b * gain * gain, c * gain
    rest = (torch.where(k != 0, k * t.to(x.dtype), 0) for k, t in ((c, z), (d, previous)) if t is not None)
    return a * x + b * score.to(x.dtype) + sum(rest)


def impose(x: Tensor, known: Tensor, known_sigma: Tensor, row: Tensor, z: Tensor) -> Tensor:
    """What x [B, C, H, W] is after a row when inpainting: known + σ·z where known is no NaN, σ = known_sigma[row]."""
    sigma = known_sigma[row].to(x.dtype)[:, None, None, None]
    return torch.where(known.isnan(), x, known.to(x.dtype) + sigma * z)


def remember(x: Tensor, score: Tensor, keep: Tensor, row: Tensor, previous: Tensor) -> Tensor:
    """What previous [B, C, H, W] is after a row: e·x + f·score with (e, f) = keep[row], or itself if both are 0."""
    e, f = keep[row].to(x.dtype).T[..., None, None, None]
    return torch.where((e != 0) | (f != 0), e * x + f * score.to(x.dtype), previous)


def noise(shape, seed: Tensor, sample_id: Tensor, draw: int, stream: int = 0, kind: str = "normal") -> Tensor:
    """The noise of each sample, float32 [B, C, H, W]: noise.fill as a tensor. seed, sample_id: int64 [B]."""
    return torch.from_numpy(fill(tuple(shape), seed.numpy(), sample_id.numpy(), draw, stream, kind))
