"""Triton: noise-conditioned norm (InstanceNorm++; reference.py) with what stands round it, in two kernels.

    s = before(x + bias + residual + residual_bias)           rounded to x's dtype; written, unless it is x + bias
    μ, v = mean and biased variance of s over H·W, for each (n, c)
    ms = (μ − mean_c μ) / √(var_c μ + 1e-5)                   var_c unbiased over C; only if alpha is given
    y = act((s − μ)·γ/√(v + eps) + (γ·α·ms + β))              γ, α, β [C], or [L, C] at row level[n]
    or, with pool, the 5×5 mean of that without act           pool.py

`stats` reads x once and writes a partial (μ, M2) for each slab of pixels; `apply` merges a sample's partials by Chan's
formula, reduces over the channels and writes y. The mean comes first and the squares are centred; s − μ is taken before
the scale, so a large mean costs no digits. No atomics: the bits depend on the sample and the configuration alone.

A bias alone is not added: it shifts a channel's mean and no deviation from it, so s − μ is x less its own mean, and
ms and the statistics of groups are made of the shifted means.

With groups (GroupNorm) a small kernel between the two merges the partials of each group's channels, once, and not in
every program of `apply`, which then reads its channels' μ and v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm_engine.kernels.arguments import Norm
from sgm_engine.kernels.triton.float8 import quantised
from sgm_engine.kernels.triton.launch import Launch, is_channels_last
from sgm_engine.kernels.triton.norm_stats import activate, coefficients, group_kernel, share, stats_kernel, tile
from sgm_engine.kernels.triton.pool import pool_kernel


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
    def of(cls, channels: int, size: int, nhwc: bool, config: NormConfig = CONFIG, slab: int | None = None) -> Tiling:
        """Whole rows of memory first: all channels of a few pixels in NHWC, all pixels of a few channels in NCHW.

        slab: where the partials are made by another kernel, the pixels of each.
        """
        padded, length = triton.next_power_of_2(channels), triton.next_power_of_2(size)
        if nhwc:
            width = min(padded, config.tile)
            pixels = min(length, config.tile // width)
            if width >= config.wide:
                pixels = max(1, pixels // 2)
        else:
            pixels = min(length, config.tile)
            width = min(padded, config.tile // pixels)
        if slab is None:
            slab = triton.cdiv(size, min(triton.cdiv(size * width, config.tile), max(1, config.partials // padded)))
        pixels = min(pixels, triton.next_power_of_2(slab))
        warps = max(1, min(config.warps, width * pixels // (1024 if nhwc and width >= config.wide else 512)))
        return cls(width, pixels, slab, triton.cdiv(size, slab), triton.cdiv(channels, width), warps)


@triton.jit
def apply_kernel(
    x_ptr,  # [N, C, H, W]: what `stats` wrote, if it did
    out_ptr,  # like x, and may be x; or float8
    partial_ptr,  # float32 [N, SLABS, 2, C], as `stats` or, with groups, group_kernel left it
    gamma_ptr,  # float32 [C] or [L, C], or None
    alpha_ptr,
    beta_ptr,
    gamma_stride,  # elements between rows; 0 if there is one row
    alpha_stride,
    beta_stride,
    level_ptr,  # int64 [N], or None
    bias_ptr,  # float32 [C], or None: the norm is of x + bias, which only alpha sees
    eps,
    inverse,  # float32, for an out of float8: reference.quantised of what would else be written; or None
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
    mean, scale, shift = coefficients(
        n, channel, partial_ptr, gamma_ptr, alpha_ptr, beta_ptr, gamma_stride, alpha_stride, beta_stride, level_ptr,
        bias_ptr, eps, C, HW, CHANNELS, SLAB, SLABS, GROUPS,
    )  # fmt: skip
    end = tl.minimum((slab + 1) * SLAB, HW)
    for i in range((SLAB + PIXELS - 1) // PIXELS):
        first = slab * SLAB + i * PIXELS
        offset, inside = tile(n, first, end, channel, C, HW, NHWC, CHANNELS, PIXELS)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        y = activate(tl.fma(x - mean, scale, shift), ACTIVATION)
        if inverse is not None:
            y = quantised(y.to(x_ptr.dtype.element_ty), inverse)
        tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


def norm_workspace_size(x: Tensor) -> int:
    """Elements of the float32 workspace that norm() of x needs."""
    batch, channels, height, width = x.shape
    return batch * Tiling.of(channels, height * width, is_channels_last(x)).slabs * 2 * channels


def describe(n: Norm) -> tuple[Launch, ...]:
    """stats unless there is a slab, group_kernel if there are groups, apply or pool."""
    batch, channels, height, width = n.x.shape
    nhwc = is_channels_last(n.x)
    tiling = Tiling.of(channels, height * width, nhwc, slab=n.slab)
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
    bias = n.bias if n.sum_out is None else None  # that of x as the later kernels read it
    stats = {"x_ptr": n.x, "residual_ptr": n.residual, "sum_ptr": n.sum_out, "partial_ptr": n.workspace}
    stats |= {"bias_ptr": None if n.sum_out is None else n.bias, "residual_bias_ptr": n.residual_bias}
    apply = {"x_ptr": n.x if n.sum_out is None else n.sum_out, "out_ptr": n.out, "partial_ptr": n.workspace}
    for name, parameter, stride in zip(("gamma", "alpha", "beta"), n.parameters, n.row_strides, strict=True):
        apply |= {f"{name}_ptr": parameter, f"{name}_stride": stride}
    apply |= {"level_ptr": n.level, "bias_ptr": None if n.alpha is None else bias, "eps": n.eps}
    launches = []
    if n.slab is None:
        launches.append(Launch(stats_kernel, programs, stats, constants | {"BEFORE": n.before}, options))
    if n.groups is not None:
        shared = {name: constants[name] for name in ("C", "HW", "SLAB", "SLABS")} | {"GROUPS": n.groups}
        given = {"partial_ptr": n.workspace, "bias_ptr": bias}
        launches.append(Launch(group_kernel, batch * n.groups, given, shared, options))
    if n.pool:
        pixels = max(1, tiling.pixels // 2)  # sums and one load in flight are more values alive than one tile
        constants = constants | {"W": width, "PIXELS": pixels, "GROUPS": n.groups}
        return *launches, Launch(pool_kernel, programs, apply, constants, options)
    constants = constants | {"ACTIVATION": n.activation, "GROUPS": n.groups}
    apply |= {"inverse": n.inverse}
    if n.activation == "silu":  # its quotient keeps more values alive: with a whole tile registers spill on sm_80
        constants["PIXELS"] = max(1, tiling.pixels // 2)
    return *launches, Launch(apply_kernel, programs, apply, constants, options)


def norm(n: Norm) -> None:
    with torch.cuda.device_of(n.x):
        for launch in describe(n):
            launch()
