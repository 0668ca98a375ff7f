"""Triton: the moments of noise_conditioned_norm, and what its kernels share (norm.py says how it all fits)."""

from __future__ import annotations

import triton
import triton.language as tl


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
def exp(y):
    """As tl.exp, but what would be subnormal may be 0, which saves three instructions; here 1 is added or taken off."""
    return tl.exp2(y * 1.4426950408889634)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "elu":
        return tl.where(y > 0, y, exp(y) - 1.0)
    elif ACTIVATION == "relu":
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        return y / (1.0 + exp(-y))
    else:
        tl.static_assert(ACTIVATION == "none")
        return y


@triton.jit
def stats_kernel(
    x_ptr,  # [N, C, H, W]
    residual_ptr,  # like x, or None
    sum_ptr,  # like x, or None: what is normalised, before(x + residual)
    partial_ptr,  # float32 [N, SLABS, 2, C]: mean and sum of squared deviations
    bias_ptr,  # float32 [C], added to x, or None; with sum_ptr only
    residual_bias_ptr,  # likewise to residual
    C: tl.constexpr,
    HW: tl.constexpr,
    NHWC: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    BEFORE: tl.constexpr,
):
    n, slab, channel = share(tl.program_id(0), C, CHANNELS, SLABS)
    end = tl.minimum((slab + 1) * SLAB, HW)
    count = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    bias = tl.zeros((CHANNELS,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=channel < C, other=0.0)
    if residual_bias_ptr is not None:
        bias += tl.load(residual_bias_ptr + channel, mask=channel < C, other=0.0)
    for i in range((SLAB + PIXELS - 1) // PIXELS):
        first = slab * SLAB + i * PIXELS
        offset, inside = tile(n, first, end, channel, C, HW, NHWC, CHANNELS, PIXELS)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        if residual_ptr is not None or bias_ptr is not None:
            summed = x.to(tl.float32)
            if residual_ptr is not None:
                summed += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            if bias_ptr is not None or residual_bias_ptr is not None:
                summed = tl.where(inside, summed + bias[None, :], 0.0)  # what is not there counts as 0 below
            x = summed.to(x.dtype)
        if BEFORE != "none":
            x = activate(x.to(tl.float32), BEFORE).to(x.dtype)
        if sum_ptr is not None:
            tl.store(sum_ptr + offset, x, mask=inside)
        x = x.to(tl.float32)
        pixels = tl.minimum(tl.maximum(end - first, 0), PIXELS).to(tl.float32)  # 0: the last slab may be shorter
        some = tl.maximum(pixels, 1.0)
        guess = tl.div_rn(tl.sum(x, 0), some)
        centred = tl.where(inside, x - guess[None, :], 0.0)
        correction = tl.div_rn(tl.sum(centred, 0), some)  # what rounding did to the mean: ms would magnify it
        delta = guess + correction - mean
        total = count + pixels
        mean += delta * tl.div_rn(pixels, total)  # 1 at first, which a GPU's own division does not promise of a / a
        m2 += tl.sum(centred * centred, 0) - correction * correction * pixels
        m2 += delta * delta * tl.div_rn(count * pixels, total)
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
    mean = guess + tl.div_rn(tl.sum((means - guess) * count, 0, keep_dims=True), HW * 1.0)
    delta = means - mean
    return mean, tl.div_rn(tl.sum(m2 + delta * delta * count, 0, keep_dims=True), HW * 1.0)


@triton.jit
def group_kernel(
    partial_ptr,  # float32 [N, SLABS, 2, C]: slab 0 becomes each channel's mean and biased variance, over its group
    bias_ptr,  # float32 [C], or None: the norm is of x + bias, and the mean becomes what is to be taken off x
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
    bias = tl.zeros((1, MEMBERS), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=inside, other=0.0)
        means += bias
    guess = tl.div_rn(tl.sum(means, 1, keep_dims=True), SIZE * 1.0)
    mean = guess + tl.div_rn(tl.sum(tl.where(inside, means - guess, 0.0), 1, keep_dims=True), SIZE * 1.0)
    delta = means - mean
    variance = tl.div_rn(tl.sum(tl.where(inside, variances + delta * delta, 0.0), 1, keep_dims=True), SIZE * 1.0)
    tl.debug_barrier()  # slab 0 has been read by every thread
    to = partial_ptr + n * SLABS * 2 * C + channel
    tl.store(to, tl.broadcast_to(mean, (1, MEMBERS)) - bias, mask=inside)
    tl.store(to + C, tl.broadcast_to(variance, (1, MEMBERS)), mask=inside)


@triton.jit
def coefficients(
    n,
    channel,
    partial_ptr,
    gamma_ptr,
    alpha_ptr,
    beta_ptr,
    gamma_stride,
    alpha_stride,
    beta_stride,
    level_ptr,
    bias_ptr,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    SLABS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """(mean, scale, shift), each [1, CHANNELS]: the norm of sample n is (x − mean)·scale + shift."""
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
        own = mean
        if bias_ptr is not None:
            means += tl.load(bias_ptr + channels, mask=channels < C, other=0.0)
            own += tl.load(bias_ptr + row, mask=row < C, other=0.0)
        centre = tl.div_rn(tl.sum(means), C * 1.0)
        spread = tl.where(channels < C, means - centre, 0.0)
        unbiased = tl.div_rn(tl.sum(spread * spread), C - 1.0)
        alpha = tl.load(alpha_ptr + level * alpha_stride + row, mask=row < C, other=0.0)
        shift = alpha * ((own - centre) * tl.div_rn(1.0, tl.sqrt_rn(unbiased + 1e-5)))
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + level * gamma_stride + row, mask=row < C, other=0.0)
        scale *= gamma
        shift *= gamma
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + level * beta_stride + row, mask=row < C, other=0.0)
    return mean, scale, shift
