"""Triton: the generator of docs/noise.md, bit-identical to kernels/noise.py, and the op that fills a tensor with it.

key = (seed low, seed high); counter = (element // 4, draw, sample id low, sample id high ^ stream); element counts in
[C, H, W] order whatever the layout. Philox4x32-10 → four words → two Box–Muller pairs in float32, every operation
rounded on its own: the kernels that use these helpers are launched with EXACT, which forbids fused multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm_engine.kernels.triton.launch import Launch, is_channels_last

# No contraction of a·b + c; and Philox's integers wrap on purpose, which Triton's debug mode must not report.
EXACT = {"enable_fp_fusion": False, "sanitize_overflow": False}


@dataclass(frozen=True)
class NoiseConfig:
    """How the generator's elements are shared out (not measured on a GPU yet)."""

    quads: int = 256  # counters, hence groups of four elements, a program: a power of two
    warps: int = 4

    @property
    def elements(self) -> int:
        return 4 * self.quads


CONFIG = NoiseConfig()


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011) on uint32 counters and keys, blocks or scalars → four words."""
    for _ in tl.static_range(10):
        left, right = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57  # one instruction each on NVIDIA
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = right.to(tl.uint32)
        c3 = left.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def low_high(value):
    """int64 → its two halves as uint32."""
    bits = value.to(tl.uint64)
    return (bits & 0xFFFFFFFF).to(tl.uint32), (bits >> 32).to(tl.uint32)


@triton.jit
def words(quad, draw, seed, sample_id, stream):
    """The four words of each quad (uint32 block) of one sample; draw, stream: uint32; seed, sample_id: int64."""
    k0, k1 = low_high(seed)
    id_low, id_high = low_high(sample_id)
    return philox(quad, draw, id_low, id_high ^ stream, k0, k1)


@triton.jit
def radius(word):
    """√(−2·ln u), u = ((word >> 8) + 1)·2⁻²⁴ ∈ (0, 1]; the logarithm is Cephes' logf."""
    u = ((word >> 8) + 1).to(tl.int32).to(tl.float32)  # exact: at most 2²⁴
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # u = m·2ᵉ with m ∈ [√½, √2)
    exponent = ((bits >> 23) - 24).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = f * square * p
    y = exponent * -2.12194440e-4 + y
    y = square * -0.5 + y
    log = exponent * 0.693359375 + (f + y)
    return tl.sqrt_rn(log * -2.0)


@triton.jit
def cosine_sine(word):
    """cos and sin of 2π·word/2³²: the nearest quarter turn exactly, in integers, Cephes' polynomials for the rest."""
    quarter = (word + 0x20000000) >> 30
    rest = (word - (quarter << 30)).to(tl.int32, bitcast=True)  # ∈ [−2²⁹, 2²⁹)
    x = (rest >> 5).to(tl.float32) * 4.6813380050e-08  # exact · 2π/2²⁷
    square = x * x
    s = square * -1.9515295891e-4 + 8.3321608736e-3
    s = s * square + -1.6666654611e-1
    s = s * (square * x) + x
    c = square * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * square + 4.166664568298827e-2
    c = c * (square * square) + (square * -0.5 + 1.0)
    odd = (quarter & 1) != 0
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quarter & 2) << 30)
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quarter + 1) & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def normals(w0, w1, w2, w3):
    """Four words → four independent standard normals."""
    r0 = radius(w0)
    c0, s0 = cosine_sine(w1)
    r1 = radius(w2)
    c1, s1 = cosine_sine(w3)
    return r0 * c0, r0 * s0, r1 * c1, r1 * s1


@triton.jit
def uniform(word):
    """float32(word >> 8)·2⁻²⁴ ∈ [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def interleave(v0, v1, v2, v3, QUADS: tl.constexpr):
    """Four blocks [QUADS], one a position within the quad → [QUADS, 4]; no data moves between threads."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (QUADS, 4))


@triton.jit
def locate(element, C: tl.constexpr, HW: tl.constexpr, NHWC: tl.constexpr):
    """element (int64, in [C, H, W] order) → its offset in the sample's memory, int64."""
    if NHWC:
        if C * HW < 2**31:
            element = element.to(tl.int32)  # a narrow division is several times cheaper
        return (element % HW).to(tl.int64) * C + element // HW
    else:
        return element


@triton.jit
def share(program, C: tl.constexpr, HW: tl.constexpr, QUADS: tl.constexpr):
    """program → (slot, its quads uint32 [QUADS], their elements int64 [QUADS, 4])."""
    blocks: tl.constexpr = (C * HW + 4 * QUADS - 1) // (4 * QUADS)
    slot = (program // blocks).to(tl.int64)
    block = program % blocks
    quad = block.to(tl.uint32) * QUADS + tl.arange(0, QUADS).to(tl.uint32)
    element = block.to(tl.int64) * (4 * QUADS) + (4 * tl.arange(0, QUADS)[:, None] + tl.arange(0, 4)[None, :])
    return slot, quad, element


@triton.jit(do_not_specialize=["draw", "tag"])
def noise_kernel(
    out_ptr,  # float32 [B, C, H, W]
    seed_ptr,  # int64 [B]
    sample_id_ptr,  # int64 [B]
    draw,  # int32, the bits of a uint32
    tag,  # int32, the bits of a uint32: the stream, a name that Triton keeps to itself
    C: tl.constexpr,
    HW: tl.constexpr,
    NHWC: tl.constexpr,
    NORMAL: tl.constexpr,
    QUADS: tl.constexpr,
):
    slot, quad, element = share(tl.program_id(0), C, HW, QUADS)
    seed = tl.load(seed_ptr + slot)
    sample_id = tl.load(sample_id_ptr + slot)
    w0, w1, w2, w3 = words(quad, draw.to(tl.uint32), seed, sample_id, tag.to(tl.uint32))
    if NORMAL:
        v0, v1, v2, v3 = normals(w0, w1, w2, w3)
    else:
        v0, v1, v2, v3 = uniform(w0), uniform(w1), uniform(w2), uniform(w3)
    offset = slot * (C * HW) + locate(element, C, HW, NHWC)
    tl.store(out_ptr + offset, interleave(v0, v1, v2, v3, QUADS), mask=element < C * HW)


def signed32(value: int) -> int:
    """A uint32 as the int32 of the same bits, so that a kernel is compiled for one integer type only."""
    return value - 2**32 if value >= 2**31 else value


def describe(
    out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str, config: NoiseConfig = CONFIG
) -> Launch:
    batch, channels, height, width = out.shape
    arguments = {
        "out_ptr": out,
        "seed_ptr": seed,
        "sample_id_ptr": sample_id,
        "draw": signed32(draw),
        "tag": signed32(stream),
    }
    constants = {
        "C": channels,
        "HW": height * width,
        "NHWC": is_channels_last(out),
        "NORMAL": {"normal": True, "uniform": False}[kind],
        "QUADS": config.quads,
    }
    programs = batch * triton.cdiv(channels * height * width, config.elements)
    return Launch(noise_kernel, programs, arguments, constants, {"num_warps": config.warps, **EXACT})


def noise_fill(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    """Fill out, float32 [B, C, H, W] (NCHW or NHWC, dense), with the "normal" or "uniform" noise of each sample.

    seed, sample_id: int64 [B]. draw: 0 … 2³²−1. stream: a tag of ``noise.STREAM``. Checks and allocates nothing.
    """
    with torch.cuda.device_of(out):
        describe(out, seed, sample_id, draw, stream, kind)()
