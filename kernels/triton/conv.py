"""Triton: a convolution of stride 1 that keeps the size, as an implicit matrix product, with what follows it.

    y = x ∗ w + bias + residual          1×1 or 3×3, any dilation; NHWC; sums in float32, rounded once
    y = scale·(x ∗ w) + bias + residual  the same of x and w in float8 (e4m3): reference.float8_convolution
    (mean, M2) of y for each tile of pixels and channel, if asked for: what `stats` of norm.py would read y for

Rows of the product are output channels, columns are pixels; the inner dimension runs over taps, then input channels,
which is how an NHWC tensor and an NHWC (channels_last) weight lie in memory. No atomics: the bits depend on the shape
and the tile alone.

TMA (sm_90 and later): a tile is a box of whole rows of an image, or of whole images. The copy engine fetches it shifted
by the tap, with zeros for what is outside, and no thread computes an address. Both operands are then read from shared
memory, where Triton would pass a box on the left of the product through registers first: hence channels on the left.

float8: Hopper's tensor cores sum its products to some 14 bits (arXiv 2412.19437, 3.3.2), so that each chunk of DEPTH
channels is added to the sum in float32. x is quantised before, not here: nine taps would each do it again, at the cost
of the products themselves, and Triton 3.7 does not add chunks in float32 if an operand comes from registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgm_engine.kernels.triton.launch import Launch


@dataclass(frozen=True)
class ConvTile:
    """A program's share: pixels × channels out, `depth` channels in at a time. Powers of two."""

    pixels: int = 128
    channels: int = 128
    depth: int = 32
    warps: int = 8
    stages: int = 3
    tma: bool = False


TILES = (ConvTile(), ConvTile(pixels=64, warps=4), ConvTile(depth=64))  # what is tuned over
# Likewise, with the shared memory or the copy engine of sm_90 and sm_100. 256 pixels are the most that one instruction
# takes there, and so read the operands least often; the smallest is for a few images, which leave multiprocessors idle.
LARGE_TILES = (
    ConvTile(pixels=256, depth=64),
    ConvTile(depth=64, tma=True),
    ConvTile(pixels=256, depth=64, stages=4, tma=True),
    ConvTile(pixels=64, channels=64, depth=64, warps=4, stages=6, tma=True),
)
FLOAT8_TILES = (
    ConvTile(depth=64),
    ConvTile(depth=128),
    ConvTile(pixels=64, depth=128, warps=4),
    ConvTile(depth=128, tma=True),
)


def float8_tile(c_in: int, c_out: int) -> ConvTile:
    """For a float8 layer that nothing is tuned for; its channels divide by 32."""
    channels, depth = (max(size for size in (32, 64, 128) if count % size == 0) for count in (c_out, c_in))
    return ConvTile(channels=channels, depth=min(depth, 64), warps=8 if channels == 128 else 4)


@triton.jit
def conv_kernel(
    x,  # [N, H, W, CIN] in memory: a pointer or, with TMA, a descriptor of blocks [IMAGES, ROWS, W, DEPTH]
    weight,  # [COUT, KERNEL, KERNEL, CIN] in memory: likewise, of blocks [CHANNELS, DEPTH]
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
    TMA: tl.constexpr,
):
    columns: tl.constexpr = COUT // CHANNELS
    steps: tl.constexpr = CIN // DEPTH
    middle: tl.constexpr = KERNEL // 2
    tile = tl.program_id(0) // columns
    first_channel = tl.program_id(0) % columns * CHANNELS
    pixel = tile.to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = first_channel + tl.arange(0, CHANNELS)
    inside = pixel < total
    if TMA:
        image, top = tile * PIXELS // (H * W), tile * PIXELS // W % H
    else:
        row, column = (pixel // W % H).to(tl.int32), (pixel % W).to(tl.int32)
        live = tl.zeros((PIXELS,), tl.int32)  # a bit for each tap that lies inside the image
        for k in tl.static_range(KERNEL * KERNEL):
            r, c = row + (k // KERNEL - middle) * DILATION, column + (k % KERNEL - middle) * DILATION
            live |= (inside & (r >= 0) & (r < H) & (c >= 0) & (c < W)).to(tl.int32) << k
        inner = tl.arange(0, DEPTH)[None, :]
        x_at = x + (pixel * CIN)[:, None] + inner
        weight_at = weight + (channel * (KERNEL * KERNEL * CIN))[:, None] + inner
    acc = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for i in range(KERNEL * KERNEL * steps):
        tap, first = i // steps, i % steps * DEPTH
        down = (tap // KERNEL - middle) * DILATION
        right = (tap % KERNEL - middle) * DILATION
        if TMA:  # what is outside the image is loaded as zeros
            a = weight.load([first_channel, i * DEPTH])
            b = tl.reshape(x.load([image, top + down, right, first]), (PIXELS, DEPTH))
        else:
            a = tl.load(weight_at + i * DEPTH)
            there = (live >> tap) & 1 != 0
            b = tl.load(x_at + ((down * W + right) * CIN + first), mask=there[:, None], other=0.0)
        if scale_ptr is None:
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=DEPTH)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channel)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel)[:, None].to(tl.float32)
    offset = pixel[:, None] * COUT + channel[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offset, mask=inside[:, None], other=0.0).T.to(tl.float32)
    y = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, y.T, mask=inside[:, None])
    if partial_ptr is not None:  # a tile lies within one image, and is whole
        y = y.to(tl.float32)
        guess = tl.sum(y, 1) * (1.0 / PIXELS)  # a power of two: exact
        centred = y - guess[:, None]
        correction = tl.sum(centred, 1) * (1.0 / PIXELS)
        at = partial_ptr + tile.to(tl.int64) * (2 * COUT) + channel
        tl.store(at, guess + correction)
        tl.store(at + COUT, tl.sum(centred * centred, 1) - correction * correction * PIXELS)


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
    if tile.tma and _box(x, tile) is None:
        return f"{tile.pixels} pixels are no whole rows or images of {x.shape[2]}×{x.shape[3]}"
    if tile.tma and (x.data_ptr() % 16 or weight.data_ptr() % 16):
        return "x and weight must begin at a multiple of 16 bytes"
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


def _box(x: Tensor, tile: ConvTile) -> list[int] | None:
    """The block of x [N, H, W, Cin] that a program with TMA fetches at a time; None: its pixels are no whole rows."""
    _, _, height, width = x.shape
    rows = min(height, tile.pixels // width)
    images = tile.pixels // max(1, rows * width)
    fits = rows and height % rows == 0 and images * rows * width == tile.pixels
    return [images, rows, width, tile.depth] if fits else None


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
    arguments = {"x": x, "weight": weight}
    if tile.tma and batch:
        strides = [height * width * c_in, width * c_in, c_in, 1]
        rows, inner = [c_out, kernel * kernel * c_in], [kernel * kernel * c_in, 1]
        arguments = {
            "x": TensorDescriptor(x, [batch, height, width, c_in], strides, _box(x, tile)),
            "weight": TensorDescriptor(weight, rows, inner, [tile.channels, tile.depth]),
        }
    arguments |= {"bias_ptr": bias, "residual_ptr": residual, "out_ptr": out}
    arguments |= {"scale_ptr": scale, "partial_ptr": partial, "total": batch * height * width}
    constants = {"H": height, "W": width, "CIN": c_in, "COUT": c_out, "KERNEL": kernel, "DILATION": dilation}
    constants |= {"PIXELS": tile.pixels, "CHANNELS": tile.channels, "DEPTH": tile.depth, "TMA": tile.tma}
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
