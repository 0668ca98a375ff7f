"""Triton: the sampler's step, x ← a·x + b·score + c·z (+ d·previous), with z made in registers.

Where the row says so, previous ← e·x + f·score follows, of the old x. A gain of the slot scales b (twice) and c.
Known pixels (inpainting) become known + σ·z instead, what the next row's network is to see of them.

Slot i of the batch reads its own row of the plan: (a, b, c, d) = coef[row[i]], draw[row[i]]. Products and sums are
rounded one by one in float32, in the order written; a term whose c or d is zero is left out. So, given equal scores,
the result is bit-identical to every other backend's. One read of x, one of score, one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sgm_engine.kernels.arguments import Update
from sgm_engine.kernels.noise import STREAM
from sgm_engine.kernels.triton.launch import Launch, is_channels_last
from sgm_engine.kernels.triton.noise import CONFIG, EXACT, NoiseConfig, interleave, locate, normals, share, words

INPAINT = tl.constexpr(STREAM["inpaint"])
ARRIVAL = tl.constexpr(2**40)  # rows are below this; the bits above count the slot's programs that have read theirs


@triton.jit
def arrive(row_ptr, stop, blocks: tl.constexpr):
    """Read a slot's row, and advance it once all its programs have read it.

    One atomic does both: it returns the row and counts the caller in, so nobody can read a row already advanced, and
    the last to arrive writes the final value (row + 1, or row if the slot is idle). No other memory is involved, hence
    neither a fence nor a buffer of tickets, and the row is clean whenever the kernel is over.
    """
    before = tl.atomic_add(row_ptr, ARRIVAL, sem="relaxed")
    row = before & (ARRIVAL - 1)
    if before - row == (blocks - 1) * ARRIVAL:
        tl.atomic_xchg(row_ptr, row + (row < stop).to(tl.int64), sem="relaxed")
    return row


@triton.jit
def block_of_normals(quad, draw_ptr, seed, sample_id, stream, QUADS: tl.constexpr):
    w0, w1, w2, w3 = words(quad, tl.load(draw_ptr).to(tl.uint32), seed, sample_id, stream)
    z0, z1, z2, z3 = normals(w0, w1, w2, w3)
    return interleave(z0, z1, z2, z3, QUADS)


@triton.jit
def update_kernel(
    x_ptr,  # float32 [B, C, H, W]
    score_ptr,  # float32, bfloat16 or float16, like x
    previous_ptr,  # float32, like x, or None; written where keep says so
    out_ptr,  # float32, like x; may be x
    coef_ptr,  # float32 [R, 4]
    draw_ptr,  # int32 [R], the bits of a uint32
    row_ptr,  # int64 [B]
    stop_ptr,  # int64 [B], or None: every slot is live
    seed_ptr,  # int64 [B]
    sample_id_ptr,  # int64 [B]
    bad_row_ptr,  # int64 [B], or None
    keep_ptr,  # float32 [R, 2], or None
    gain_ptr,  # float32 [B], or None
    known_ptr,  # float32, as out in shape and layout, NaN where a pixel is not known; or None
    known_sigma_ptr,  # float32 [R], or None
    known_draw_ptr,  # int32 [R], the bits of a uint32, or None
    C: tl.constexpr,
    HW: tl.constexpr,
    X_NHWC: tl.constexpr,
    SCORE_NHWC: tl.constexpr,
    PREVIOUS_NHWC: tl.constexpr,
    OUT_NHWC: tl.constexpr,
    ADVANCE: tl.constexpr,
    QUADS: tl.constexpr,
):
    slot, quad, element = share(tl.program_id(0), C, HW, QUADS)
    seed = tl.load(seed_ptr + slot)
    sample_id = tl.load(sample_id_ptr + slot)
    stop = tl.load(stop_ptr + slot) if stop_ptr is not None else ARRIVAL
    blocks: tl.constexpr = (C * HW + 4 * QUADS - 1) // (4 * QUADS)
    row = arrive(row_ptr + slot, stop, blocks) if ADVANCE else tl.load(row_ptr + slot)
    if row >= stop:
        return

    inside = element < C * HW
    base = slot * (C * HW)
    a = tl.load(coef_ptr + row * 4)
    b = tl.load(coef_ptr + row * 4 + 1)
    c = tl.load(coef_ptr + row * 4 + 2)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + slot)
        b = (b * gain) * gain
        c = c * gain
    noisy = c != 0
    if known_ptr is not None:  # noise for known pixels if the program has any, and the row's unless it has no others
        known = tl.load(known_ptr + base + locate(element, C, HW, OUT_NHWC), mask=inside, other=float("nan"))
        noisy = noisy & (tl.max((inside & (known != known)).to(tl.int32)) != 0)
        sigma = tl.load(known_sigma_ptr + row)
        if (sigma != 0) & (tl.max((known == known).to(tl.int32)) != 0):
            known = known + sigma * block_of_normals(quad, known_draw_ptr + row, seed, sample_id, INPAINT, QUADS)
    x = tl.load(x_ptr + base + locate(element, C, HW, X_NHWC), mask=inside, other=0.0)
    score = tl.load(score_ptr + base + locate(element, C, HW, SCORE_NHWC), mask=inside, other=0.0)
    t = a * x
    t = t + b * score.to(tl.float32)
    if noisy:
        t = t + c * block_of_normals(quad, draw_ptr + row, seed, sample_id, 0, QUADS)
    if previous_ptr is not None:
        d = tl.load(coef_ptr + row * 4 + 3)
        offset = base + locate(element, C, HW, PREVIOUS_NHWC)
        if d != 0:
            t = t + d * tl.load(previous_ptr + offset, mask=inside, other=0.0)
        if keep_ptr is not None:
            e = tl.load(keep_ptr + row * 2)
            f = tl.load(keep_ptr + row * 2 + 1)
            if (e != 0) | (f != 0):
                tl.store(previous_ptr + offset, e * x + f * score.to(tl.float32), mask=inside)
    if known_ptr is not None:
        t = tl.where(known == known, known, t)
    tl.store(out_ptr + base + locate(element, C, HW, OUT_NHWC), t, mask=inside)
    if bad_row_ptr is not None:
        bad = tl.max((inside & ~(tl.abs(t) < float("inf"))).to(tl.int32), axis=1)  # [QUADS]; NaN compares false
        # A predicated atomic a quad: finite results cost no reduction across threads, no barrier and no branch.
        tl.atomic_min(bad_row_ptr + slot + tl.zeros_like(quad), row, mask=bad != 0, sem="relaxed")


def describe(u: Update, config: NoiseConfig = CONFIG) -> Launch:
    batch, channels, height, width = u.x.shape
    pointers = {f"{name}_ptr": value for name, value in u._asdict().items() if name != "advance"}
    constants = {
        "C": channels,
        "HW": height * width,
        "X_NHWC": is_channels_last(u.x),
        "SCORE_NHWC": is_channels_last(u.score),
        "PREVIOUS_NHWC": u.previous is not None and is_channels_last(u.previous),
        "OUT_NHWC": is_channels_last(u.out),
        "ADVANCE": u.advance,
        "QUADS": config.quads,
    }
    programs = batch * triton.cdiv(channels * height * width, config.elements)
    return Launch(update_kernel, programs, pointers, constants, {"num_warps": config.warps, **EXACT})


def langevin_update(u: Update) -> None:
    """Pointers may be captured in a CUDA graph."""
    with torch.cuda.device_of(u.x):
        describe(u)()
