"""Triton: noise-conditioned norm (InstanceNorm++; reference.py) with residual and activation, in two kernels.

    s = x + residual                                          rounded to x's dtype; written
    μ, v = mean and biased variance of s over H·W, for each (n, c)
    ms = (μ − mean_c μ) / √(var_c μ + 1e-5)                   var_c unbiased over C; only if alpha is given
    y = act((s − μ)·γ/√(v + eps) + (γ·α·ms + β))              γ, α, β [C], or [L, C] at row level[n]

`stats` reads x once and writes a partial (μ, M2) for each slab of pixels; `apply` merges a sample's partials by Chan's
formula, reduces over the channels and writes y. The mean comes first and the squares are centred; s − μ is taken before
the scale, so a large mean costs no digits. No atomics: the bits depend on the sample and the configuration alone.

With groups (GroupNorm) a small kernel between the two merges the partials of each group's channels, once, and not in
every program of `apply`, which then reads its channels' μ and v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm_engine.kernels.launch import Launch, is_channels_last


@dataclass(frozen=True)
class NormConfig:
    """How a sample [C, H·W] is shared out (not measured on a GPU yet). Powers of two."""

    tile: int = 16384  # elements a program holds in registers, and works through unless there would be more…
    partials: int = 8192  # …partials of a sample than this, which every program of `apply` has to merge
    warps: int = 16
    wide: int = 1024  # channels from which a program takes half a tile: a sum over pixels needs scratch for all of them


CONFIG = NormConfig()


@dataclass(frozen=True)
class Tiling:
    """A program takes `channels` channels and one slab of pixels, `pixels` at a time."""

    channels: int
    pixels: int
    slab: int  # pixels a program
    slabs: int  # programs along the pixels
    blocks: int  # programs along the channels
    warps: int

    @classmethod
    def of(cls, channels: int, size: int, nhwc: bool, config: NormConfig = CONFIG) -> Tiling:
        """Whole rows of memory first: all channels of a few pixels in NHWC, all pixels of a few channels in NCHW."""
        padded, length = triton.next_power_of_2(channels), triton.next_power_of_2(size)
        if nhwc:
            width = min(padded, config.tile)
            pixels = min(length, config.tile // width)
            if width >= config.wide:
                pixels = max(1, pixels // 2)
        else:
            pixels = min(length, config.tile)
            width = min(padded, config.tile // pixels)
        slabs = min(triton.cdiv(size * width, config.tile), max(1, config.partials // padded))
        slab = triton.cdiv(size, slabs)
        warps = max(1, min(config.warps, width * pixels // (1024 if nhwc and width >= config.wide else 512)))
        return cls(width, pixels, slab, triton.cdiv(size, slab), triton.cdiv(channels, width), warps)


@triton.jit
def share(program, C: tl.constexpr, CHANNELS: tl.constexpr, SLABS: tl.constexpr):
    """program → (sample, slab, channels [CHANNELS])."""
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    n = (program // (blocks * SLABS)).to(tl.int64)
    slab = program // blocks % SLABS
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return n, slab, channel


@triton.jit
def tile(
    n,
    first,
    end,
    channel,
    C: tl.constexpr,
    HW: tl.constexpr,
    NHWC: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Offsets (int64) and mask [PIXELS, CHANNELS] of the pixels first … first + PIXELS − 1, those before end."""
    pixel = (first + tl.arange(0, PIXELS))[:, None]
    inside = pixel < end
    if C % CHANNELS:
        inside &= (channel < C)[None, :]
    if NHWC:
        return n * (C * HW) + pixel.to(tl.int64) * C + channel[None, :], inside
    else:
        return n * (C * HW) + channel[None, :].to(tl.int64) * HW + pixel, inside


@triton.jit
def stats_kernel(
    x_ptr,  # [N, C, H, W]
    residual_ptr,  # like x, or None
    sum_ptr,  # like x, or None: x + residual
    partial_ptr,  # float32 [N, SLABS, 2, C]: mean and sum of squared deviations
    C: tl.constexpr,
    HW: tl.constexpr,
    NHWC: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
):
    n, slab, channel = share(tl.program_id(0), C, CHANNELS, SLABS)
    end = tl.minimum((slab + 1) * SLAB, HW)
    count = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    for i in range((SLAB + PIXELS - 1) // PIXELS):
        first = slab * SLAB + i * PIXELS
        offset, inside = tile(n, first, end, channel, C, HW, NHWC, CHANNELS, PIXELS)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(sum_ptr + offset, x, mask=inside)
        x = x.to(tl.float32)
        pixels = tl.minimum(end - first, PIXELS).to(tl.float32)
        guess = tl.sum(x, 0) / pixels
        centred = tl.where(inside, x - guess[None, :], 0.0)
        correction = tl.sum(centred, 0) / pixels  # what rounding did to the mean: ms would magnify it
        delta = guess + correction - mean
        total = count + pixels
        mean += delta * (pixels / total)
        m2 += tl.sum(centred * centred, 0) - correction * correction * pixels
        m2 += delta * delta * (count * pixels / total)
        count = total
    to = partial_ptr + (n * SLABS + slab) * 2 * C + channel
    tl.store(to, mean, mask=channel < C)
    tl.store(to + C, m2, mask=channel < C)


@triton.jit
def merge(
    partial_ptr,
    n,
    channel,
    C: tl.constexpr,
    HW: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
):
    """A sample's partials → mean and biased variance over H·W (Chan et al. 1983); channel and they: [1, CHANNELS]."""
    # A value for every thread at least: of fewer, Triton 3.7 moves whole tiles through shared memory later on.
    slab = tl.arange(0, max(triton.next_power_of_2(SLABS), 1024 // CHANNELS))[:, None]
    inside = (slab < SLABS) & (channel < C)
    at = partial_ptr + (n * SLABS + slab) * 2 * C + channel
    means = tl.load(at, mask=inside, other=0.0)
    m2 = tl.load(at + C, mask=inside, other=0.0)
    count = tl.minimum(tl.maximum(HW - slab * SLAB, 0), SLAB).to(tl.float32)
    guess = tl.load(partial_ptr + n * SLABS * 2 * C + channel, mask=channel < C, other=0.0)  # shift: keeps every digit
    mean = guess + tl.sum((means - guess) * count, 0, keep_dims=True) / HW
    delta = means - mean
    return mean, tl.sum(m2 + delta * delta * count, 0, keep_dims=True) / HW


@triton.jit
def group_kernel(
    partial_ptr,  # float32 [N, SLABS, 2, C]: slab 0 becomes each channel's mean and biased variance, over its group
    C: tl.constexpr,
    HW: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    SIZE: tl.constexpr = C // GROUPS
    MEMBERS: tl.constexpr = triton.next_power_of_2(SIZE)
    n = (tl.program_id(0) // GROUPS).to(tl.int64)
    member = tl.arange(0, MEMBERS)[None, :]
    inside = member < SIZE
    channel = tl.where(inside, tl.program_id(0) % GROUPS * SIZE + member, C)
    means, variances = merge(partial_ptr, n, channel, C, HW, MEMBERS, SLAB, SLABS)
    guess = tl.sum(means, 1, keep_dims=True) / SIZE
    mean = guess + tl.sum(tl.where(inside, means - guess, 0.0), 1, keep_dims=True) / SIZE
    delta = means - mean
    variance = tl.sum(tl.where(inside, variances + delta * delta, 0.0), 1, keep_dims=True) / SIZE
    tl.debug_barrier()  # slab 0 has been read by every thread
    to = partial_ptr + n * SLABS * 2 * C + channel
    tl.store(to, tl.broadcast_to(mean, (1, MEMBERS)), mask=inside)
    tl.store(to + C, tl.broadcast_to(variance, (1, MEMBERS)), mask=inside)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "elu":
        return tl.where(y > 0, y, tl.exp(tl.minimum(y, 0.0)) - 1.0)
    elif ACTIVATION == "relu":
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        return y / (1.0 + tl.exp(-y))
    else:
        tl.static_assert(ACTIVATION == "none")
        return y


@triton.jit
def apply_kernel(
    x_ptr,  # [N, C, H, W]: the sum, if there is a residual
    out_ptr,  # like x; may be x
    partial_ptr,  # float32 [N, SLABS, 2, C], as `stats` or, with groups, group_kernel left it
    gamma_ptr,  # float32 [C] or [L, C], or None
    alpha_ptr,
    beta_ptr,
    gamma_stride,  # elements between rows; 0 if there is one row
    alpha_stride,
    beta_stride,
    level_ptr,  # int64 [N], or None
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    NHWC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    GROUPS: tl.constexpr,  # or None
):
    # Backwards: it starts with what `stats` has just left in the cache.
    n, slab, channel = share(tl.num_programs(0) - 1 - tl.program_id(0), C, CHANNELS, SLABS)
    row = channel[None, :]
    if GROUPS is not None:
        at = partial_ptr + n * SLABS * 2 * C + row
        mean = tl.load(at, mask=row < C, other=0.0)
        variance = tl.load(at + C, mask=row < C, other=0.0)
    else:
        mean, variance = merge(partial_ptr, n, row, C, HW, CHANNELS, SLAB, SLABS)
    scale = tl.rsqrt(variance + eps)
    shift = tl.zeros((1, CHANNELS), tl.float32)
    level = tl.zeros((), tl.int64)
    if level_ptr is not None:
        level = tl.load(level_ptr + n)
    if alpha_ptr is not None:
        ALL: tl.constexpr = triton.next_power_of_2(C)
        channels = tl.arange(0, ALL)[None, :]
        means, _ = merge(partial_ptr, n, channels, C, HW, ALL, SLAB, SLABS)
        centre = tl.sum(means) / C
        spread = tl.where(channels < C, means - centre, 0.0)
        unbiased = tl.sum(spread * spread) / (C - 1)
        alpha = tl.load(alpha_ptr + level * alpha_stride + row, mask=row < C, other=0.0)
        shift = alpha * ((mean - centre) * tl.rsqrt(unbiased + 1e-5))
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + level * gamma_stride + row, mask=row < C, other=0.0)
        scale *= gamma
        shift *= gamma
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + level * beta_stride + row, mask=row < C, other=0.0)
    end = tl.minimum((slab + 1) * SLAB, HW)
    for i in range((SLAB + PIXELS - 1) // PIXELS):
        first = slab * SLAB + i * PIXELS
        offset, inside = tile(n, first, end, channel, C, HW, NHWC, CHANNELS, PIXELS)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        y = activate((x - mean) * scale + shift, ACTIVATION)
        tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


def norm_workspace_size(x: Tensor) -> int:
    """Elements of the float32 workspace that norm() of x needs."""
    batch, channels, height, width = x.shape
    return batch * Tiling.of(channels, height * width, is_channels_last(x)).slabs * 2 * channels


def describe(
    x: Tensor,
    gamma: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    level: Tensor | None,
    activation: str,
    residual: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
    workspace: Tensor,
    groups: int | None = None,
) -> tuple[Launch, ...]:
    """stats, group_kernel if there are groups, apply."""
    batch, channels, height, width = x.shape
    nhwc = is_channels_last(x)
    tiling = Tiling.of(channels, height * width, nhwc)
    constants = {
        "C": channels,
        "HW": height * width,
        "NHWC": nhwc,
        "CHANNELS": tiling.channels,
        "PIXELS": tiling.pixels,
        "SLAB": tiling.slab,
        "SLABS": tiling.slabs,
    }
    programs, options = batch * tiling.blocks * tiling.slabs, {"num_warps": tiling.warps}
    stats = {"x_ptr": x, "residual_ptr": residual, "sum_ptr": sum_out, "partial_ptr": workspace}
    apply = {"x_ptr": x if residual is None else sum_out, "out_ptr": out, "partial_ptr": workspace}
    for name, parameter in (("gamma", gamma), ("alpha", alpha), ("beta", beta)):
        apply[f"{name}_ptr"] = parameter
        apply[f"{name}_stride"] = 0 if parameter is None or parameter.dim() == 1 else parameter.stride(0)
    apply |= {"level_ptr": level, "eps": eps}
    launches = [Launch(stats_kernel, programs, stats, constants, options)]
    if groups is not None:
        shared = {name: constants[name] for name in ("C", "HW", "SLAB", "SLABS")} | {"GROUPS": groups}
        launches.append(Launch(group_kernel, batch * groups, {"partial_ptr": workspace}, shared, options))
    constants = constants | {"ACTIVATION": activation, "GROUPS": groups}
    if activation == "silu":  # its quotient keeps more values alive: with a whole tile registers spill on sm_80
        constants["PIXELS"] = max(1, tiling.pixels // 2)
    return *launches, Launch(apply_kernel, programs, apply, constants, options)


def norm(
    x: Tensor,
    gamma: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    level: Tensor | None,
    activation: str,
    residual: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
    workspace: Tensor,
    groups: int | None = None,
) -> None:
    """out ← act(norm(x)), or act(norm(x + residual)) with the sum written to sum_out.

    x: float32, bfloat16 or float16 [N, C, H, W], NCHW or NHWC, dense; residual, out, sum_out: like x; out may be x or
    sum_out, and sum_out may be x or residual. gamma, alpha, beta: float32 [C], or [L, C] with dense rows; None leaves
    the term out. level: int64 [N], the row of [L, C]. workspace: float32, norm_workspace_size(x) elements, any content.
    groups: divides C, statistics are then over a group's channels; alpha is None.
    Checks and allocates nothing.
    """
    with torch.cuda.device_of(x):
        arguments = (x, gamma, alpha, beta, level, activation, residual, eps, out, sum_out, workspace, groups)
        for launch in describe(*arguments):
            launch()
