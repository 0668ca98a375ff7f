"""Triton: the 5×5 mean of a norm, stride 1, padding counted as zeros, as chained residual pooling takes it.

    pool((s − μ)·A + B) = A/25 · Σ (s − μ) + B·n/25,   Σ and n over the taps that lie inside the image

so the norm itself is never written: one more read of s, which the caches serve 25 times, and one write. In float32 the
mean is taken off before the sum, so a large one costs no digits; 16-bit values have none to lose in a float32 sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgm_engine.kernels.triton.norm_stats import coefficients, share, tile


@triton.jit
def pool_kernel(
    x_ptr,  # [N, C, H, W]: what `stats` wrote, if it did
    out_ptr,  # like x, and not x
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
    C: tl.constexpr,
    HW: tl.constexpr,
    W: tl.constexpr,
    NHWC: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    GROUPS: tl.constexpr,  # or None
):
    n, slab, channel = share(tl.num_programs(0) - 1 - tl.program_id(0), C, CHANNELS, SLABS)
    mean, scale, shift = coefficients(
        n, channel, partial_ptr, gamma_ptr, alpha_ptr, beta_ptr, gamma_stride, alpha_stride, beta_stride, level_ptr,
        bias_ptr, eps, C, HW, CHANNELS, SLAB, SLABS, GROUPS,
    )  # fmt: skip
    H: tl.constexpr = HW // W
    step: tl.constexpr = C if NHWC else 1  # elements from a pixel to the next
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    end = tl.minimum((slab + 1) * SLAB, HW)
    if not EXACT:
        shift -= mean * scale
    for i in range((SLAB + PIXELS - 1) // PIXELS):
        first = slab * SLAB + i * PIXELS
        offset, inside = tile(n, first, end, channel, C, HW, NHWC, CHANNELS, PIXELS)
        pixel = (first + tl.arange(0, PIXELS))[:, None]
        row, column = pixel // W, pixel % W
        total = tl.zeros((PIXELS, CHANNELS), tl.float32)
        taps = tl.zeros((PIXELS, 1), tl.float32)
        above, below = tl.maximum(-2, -((first + PIXELS - 1) // W)), tl.minimum(2, H - 1 - first // W)
        for down in range(above, below + 1):  # no constants, else 25 taps are unrolled, and spill on AMD
            for right in range(-2, 3):
                there = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
                x = tl.load(x_ptr + offset + (down * W + right) * step, mask=inside & there, other=0.0).to(tl.float32)
                total += tl.where(there, x - mean, 0.0) if EXACT else x
                taps += there.to(tl.float32)
        y = tl.fma(total, scale * 0.04, shift * (taps * 0.04))
        tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)
