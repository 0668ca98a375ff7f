"""Triton: the gradient of GroupNorm with activation, one program for each group of each sample, no atomics.

    h = grad·act'(y),  y = γ·x̂ + β,  x̂ = (x − μ)·r                μ, r = rsqrt(var + eps) over the group's m = C/G·H·W
    dx = r·(γ·h − (Σ γ·h + x̂·Σ γ·h·x̂)/m)                           sums over the group
    dγ = Σ h·x̂,  dβ = Σ h                                          sums over the pixels, each sample's own

x is read four times, the last three from the cache: mean, centred squares, sums of each channel, dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgm_engine.kernels.arguments import NormBackward
from sgm_engine.kernels.triton.launch import Launch
from sgm_engine.kernels.triton.norm_stats import exp

TILE = 4096  # elements that a program holds of one channel


@triton.jit
def through(dy, y, ACTIVATION: tl.constexpr):
    """dy·d act(y)/dy. As PyTorch: where y is NaN, relu and elu let dy through; relu's 0 holds for any dy."""
    if ACTIVATION == "elu":
        return tl.where(y <= 0, dy * exp(y), dy)
    elif ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, dy)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + exp(-y))
        return dy * (s * (1.0 + y * (1.0 - s)))
    else:
        tl.static_assert(ACTIVATION == "none")
        return dy


@triton.jit
def backward_kernel(
    x_ptr,  # [N, C, HW]
    grad_ptr,  # like x
    dx_ptr,  # like x
    gamma_ptr,  # float32 [C], or None
    beta_ptr,
    dgamma_ptr,  # float32 [N, C]
    dbeta_ptr,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    SIZE: tl.constexpr = C // GROUPS
    ELEMENTS: tl.constexpr = SIZE * HW
    row = (tl.program_id(0) // GROUPS).to(tl.int64) * C + tl.program_id(0) % GROUPS * SIZE  # of [N·C, HW]
    channel = tl.program_id(0) % GROUPS * SIZE
    lane = tl.arange(0, TILE)

    total = tl.zeros((TILE,), tl.float32)
    for i in range(0, ELEMENTS, TILE):
        total += tl.load(x_ptr + row * HW + i + lane, mask=i + lane < ELEMENTS, other=0.0).to(tl.float32)
    guess = tl.div_rn(tl.sum(total, 0), ELEMENTS * 1.0)
    left = tl.zeros((TILE,), tl.float32)
    square = tl.zeros((TILE,), tl.float32)
    for i in range(0, ELEMENTS, TILE):
        x = tl.load(x_ptr + row * HW + i + lane, mask=i + lane < ELEMENTS, other=0.0).to(tl.float32)
        centred = tl.where(i + lane < ELEMENTS, x - guess, 0.0)
        left += centred
        square = tl.fma(centred, centred, square)
    rest = tl.div_rn(tl.sum(left, 0), ELEMENTS * 1.0)  # what the rounding of the mean left over
    r = tl.rsqrt(tl.div_rn(tl.sum(square, 0), ELEMENTS * 1.0) - rest * rest + eps)

    sum_h = 0.0
    sum_hx = 0.0
    for c in range(SIZE):
        gamma = 1.0
        beta = 0.0
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + channel + c)
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + channel + c)
        part_h = tl.zeros((TILE,), tl.float32)
        part_hx = tl.zeros((TILE,), tl.float32)
        for i in range(0, HW, TILE):
            inside = i + lane < HW
            at = (row + c) * HW + i + lane
            xhat = ((tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - guess) - rest) * r
            dy = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            h = through(dy, tl.fma(gamma, xhat, beta), ACTIVATION)
            part_h += h
            part_hx = tl.fma(h, xhat, part_hx)
        dbeta = tl.sum(part_h, 0)
        dgamma = tl.sum(part_hx, 0)
        tl.store(dbeta_ptr + row + c, dbeta)
        tl.store(dgamma_ptr + row + c, dgamma)
        sum_h += gamma * dbeta
        sum_hx += gamma * dgamma

    mean_h = tl.div_rn(sum_h, ELEMENTS * 1.0)
    mean_hx = tl.div_rn(sum_hx, ELEMENTS * 1.0)
    for c in range(SIZE):
        gamma = 1.0
        beta = 0.0
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + channel + c)
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + channel + c)
        for i in range(0, HW, TILE):
            inside = i + lane < HW
            at = (row + c) * HW + i + lane
            xhat = ((tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - guess) - rest) * r
            dy = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            h = through(dy, tl.fma(gamma, xhat, beta), ACTIVATION)
            dx = (gamma * h - (mean_h + xhat * mean_hx)) * r  # 0 for a group of one element: nothing is fused
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def describe(n: NormBackward) -> tuple[Launch, ...]:
    batch, channels, height, width = n.x.shape
    arguments = {"x_ptr": n.x, "grad_ptr": n.grad, "dx_ptr": n.dx, "gamma_ptr": n.gamma, "beta_ptr": n.beta}
    arguments |= {"dgamma_ptr": n.dgamma, "dbeta_ptr": n.dbeta, "eps": n.eps}
    tile = min(TILE, triton.next_power_of_2(height * width))
    constants = {"C": channels, "HW": height * width, "GROUPS": n.groups, "ACTIVATION": n.activation, "TILE": tile}
    options = {"num_warps": max(1, min(8, tile // 256))}
    return (Launch(backward_kernel, batch * n.groups, arguments, constants, options),)


def norm_backward(n: NormBackward) -> None:
    with torch.cuda.device_of(n.x):
        for launch in describe(n):
            launch()
