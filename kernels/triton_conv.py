"""Triton: a convolution of stride 1 that keeps the size, as an implicit matrix product, with what follows it.

    y = x ∗ w + bias + residual          1×1 or 3×3, any dilation; NHWC; sums in float32, rounded once
    y = scale·(x ∗ w) + bias + residual  the same of x and w in float8 (e4m3): reference.float8_convolution
    (mean, M2) of y for each tile of pixels and channel, if asked for: what `stats` of triton_norm.py would read y for

Rows of the product are pixels, columns are output channels; the inner dimension runs over taps, then input channels,
which is how an NHWC tensor and an NHWC (channels_last) weight lie in memory. No atomics: the bits depend on the shape
and the tile alone.

float8: Hopper's tensor cores sum its products to some 14 bits (arXiv 2412.19437, 3.3.2), so that each chunk of DEPTH
channels is added to the sum in float32. x is quantised before, not here: nine taps would each do it again, at the cost
of the products themselves, and Triton 3.7 does not add chunks in float32 if an operand comes from registers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm_engine.kernels.launch import Launch


@dataclass(frozen=True)
class ConvTile:
    """A program's share: pixels × channels out, `depth` channels in at a time. Powers of two."""

    pixels: int = 128
    channels: int = 128
    depth: int = 32
    warps: int = 8
    stages: int = 3


TILES = (ConvTile(), ConvTile(pixels=64, channels=128, warps=4), ConvTile(depth=64))  # what is tuned over
# Likewise, where shared memory is large (sm_90, sm_100), and without statistics, for which it has no registers left.
LARGE_TILES = (ConvTile(channels=256, depth=64),)
FLOAT8_TILES = (ConvTile(depth=64), ConvTile(depth=128), ConvTile(pixels=64, depth=128, warps=4))


def float8_tile(c_in: int, c_out: int) -> ConvTile:
    """For a float8 layer that nothing is tuned for; its channels divide by 32."""
    channels, depth = (max(size for size in (32, 64, 128) if count % size == 0) for count in (c_out, c_in))
    return ConvTile(channels=channels, depth=min(depth, 64), warps=8 if channels == 128 else 4)


@triton.jit
def conv_kernel(
    x_ptr,  # [N, H, W, CIN] in memory
    weight_ptr,  # [COUT, KERNEL, KERNEL, CIN] in memory
    scale_ptr,  # float32 [COUT] if x and weight are float8, else None
    bias_ptr,  # float32 or like out, [COUT]; or None
    residual_ptr,  # like out, or None
    out_ptr,  # [N, H, W, COUT] in memory
    partial_ptr,  # float32 [N, H·W / PIXELS, 2, COUT], or None
    total,  # N·H·W
    H: tl.constexpr,
    W: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    columns: tl.constexpr = COUT // CHANNELS
    tile = tl.program_id(0) // columns
    pixel = tile.to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(0) % columns * CHANNELS + tl.arange(0, CHANNELS)
    row, column = (pixel // W % H).to(tl.int32), (pixel % W).to(tl.int32)
    inner = tl.arange(0, DEPTH)
    steps: tl.constexpr = CIN // DEPTH
    acc = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in range(KERNEL * KERNEL * steps):
        tap, first = i // steps, i % steps * DEPTH
        down = (tap // KERNEL - KERNEL // 2) * DILATION
        right = (tap % KERNEL - KERNEL // 2) * DILATION
        there = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W) & (pixel < total)
        source = (pixel + down * W + right) * CIN + first
        x = tl.load(x_ptr + source[:, None] + inner[None, :], mask=there[:, None], other=0.0)
        at = channel * (KERNEL * KERNEL * CIN) + tap * CIN + first
        w = tl.load(weight_ptr + at[None, :] + inner[:, None])
        if scale_ptr is None:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=DEPTH)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channel)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel)[None, :].to(tl.float32)
    offset = pixel[:, None] * COUT + channel[None, :]
    inside = (pixel < total)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, y, mask=inside)
    if partial_ptr is not None:  # a tile lies within one image, and is whole
        y = y.to(tl.float32)
        guess = tl.sum(y, 0) / PIXELS
        centred = y - guess[None, :]
        correction = tl.sum(centred, 0) / PIXELS
        at = partial_ptr + tile.to(tl.int64) * (2 * COUT) + channel
        tl.store(at, guess + correction)
        tl.store(at + COUT, tl.sum(centred * centred, 0) - correction * correction * PIXELS)


def refusal(
    x: Tensor, weight: Tensor, tile: ConvTile, statistics: bool = False, residual: Tensor | None = None
) -> str | None:
    """Why the kernel cannot do it with this tile, or None if it can."""
    c_out, c_in, *kernel = weight.shape
    if tuple(kernel) not in ((1, 1), (3, 3)):
        return f"kernel {tuple(kernel)} is neither 1×1 nor 3×3"
    if c_in % tile.depth or c_out % tile.channels:
        return f"{c_in} → {c_out} channels do not divide by {tile.depth} and {tile.channels}"
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)):
        return "x and weight must be channels_last"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}"
    if statistics and x.shape[2] * x.shape[3] % tile.pixels:
        return f"{x.shape[2]}×{x.shape[3]} pixels do not divide by {tile.pixels}"
    if residual is not None:
        dtype = torch.bfloat16 if x.dtype.itemsize == 1 else x.dtype
        if residual.shape != (len(x), c_out, *x.shape[2:]) or residual.dtype != dtype:
            return f"residual is {residual.dtype} {list(residual.shape)}, the result is not"
        if not residual.is_contiguous(memory_format=torch.channels_last):
            return "residual must be channels_last"
    return None


def describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    out: Tensor,
    partial: Tensor | None = None,
    tile: ConvTile = TILES[0],
    scale: Tensor | None = None,
) -> Launch:
    batch, c_in, height, width = x.shape
    c_out, _, kernel, _ = weight.shape
    arguments = {"x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "residual_ptr": residual, "out_ptr": out}
    arguments |= {"scale_ptr": scale, "partial_ptr": partial, "total": batch * height * width}
    constants = {"H": height, "W": width, "CIN": c_in, "COUT": c_out, "KERNEL": kernel, "DILATION": dilation}
    constants |= {"PIXELS": tile.pixels, "CHANNELS": tile.channels, "DEPTH": tile.depth}
    programs = triton.cdiv(batch * height * width, tile.pixels) * (c_out // tile.channels)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Launch(conv_kernel, programs, arguments, constants, options)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dilation: int,
    out: Tensor,
    partial: Tensor | None = None,
    tile: ConvTile = TILES[0],
    scale: Tensor | None = None,
) -> None:
    """out ← x ∗ weight + bias + residual, stride 1, padding that keeps the size.

    x: float32, bfloat16, float16 or float8 [N, Cin, H, W], channels_last, as all images here; weight: [Cout, Cin, k, k]
    of its dtype, channels_last; residual, out: [N, Cout, H, W]; bias: [Cout]. partial: float32 [N, H·W / tile.pixels,
    2, Cout], the mean and the sum of squared deviations of each tile of out. scale: float32 [Cout], of x and weight in
    float8_e4m3fn; bias is then float32, and residual and out have another dtype.
    Checks and allocates nothing: ``refusal`` says what it cannot do.
    """
    with torch.cuda.device_of(x):
        describe(x, weight, bias, residual, dilation, out, partial, tile, scale)()


def as_dict(tile: ConvTile) -> dict[str, int]:
    return asdict(tile)
