"""Triton: float8 (e4m3) of a tensor, reference.quantised, for a convolution to read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm_engine.kernels.triton.launch import Launch

ELEMENTS, WARPS = 8192, 8  # of a program; not measured on a GPU yet


@triton.jit
def quantised(x, inverse):
    """Limited by itself: what a conversion does to values that are too large differs from one to another."""
    return tl.clamp(x.to(tl.float32) * inverse, -448.0, 448.0, tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def quantise_kernel(
    x_ptr,  # any float
    out_ptr,  # float8, in the same places
    inverse,  # float32
    total,  # elements
    ELEMENTS: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = tl.load(x_ptr + offset, mask=offset < total, other=0.0)
    tl.store(out_ptr + offset, quantised(x, inverse), mask=offset < total)


def describe(x: Tensor, inverse: float, out: Tensor) -> Launch:
    arguments = {"x_ptr": x, "out_ptr": out, "inverse": inverse, "total": x.numel()}
    programs = triton.cdiv(x.numel(), ELEMENTS)
    return Launch(quantise_kernel, programs, arguments, {"ELEMENTS": ELEMENTS}, {"num_warps": WARPS})


def quantise(x: Tensor, inverse: float, out: Tensor) -> None:
    """out ← x·inverse in float8_e4m3fn, to the nearest, at most ±448; NaN stays NaN.

    x: float32, bfloat16 or float16, dense; out: of its shape and strides. Checks and allocates nothing.
    """
    with torch.cuda.device_of(x):
        describe(x, inverse, out)()
