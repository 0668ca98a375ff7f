"""The definition of the noise: sample i's noise is a function of (seed, sample id, draw, stream, element) alone.

Philox4x32-10 (Salmon et al., SC 2011) and a Box–Muller transform made of integer operations and of float32 add,
multiply and square root, each rounded on its own, in a fixed order. C++ and CUDA (csrc/noise.h) and Triton
(kernels/triton/noise.py) give the same bits. docs/noise.md is the specification in words.
"""

from __future__ import annotations

import numpy as np

STREAM = {  # top 8 bits of word 3
    "sample": 0x00000000, "inpaint": 0x01000000, "train": 0x02000000, "accept": 0x03000000, "user": 0x7F000000,
}  # fmt: skip
MAX_SAMPLE_ID = 2**56 - 1

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_f = np.float32


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox. counter: uint32 [4, ...], key: uint32 [2, ...]; they broadcast. Returns uint32 [4, ...]."""
    c0, c1, c2, c3 = np.asarray(counter, np.uint32)
    k0, k1 = (np.atleast_1d(k) for k in np.asarray(key, np.uint32))  # arrays wrap in silence, NumPy scalars warn
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # uint64
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, _low(p1), _high(p0) ^ c3 ^ k1, _low(p0)
        k0, k1 = k0 + _W0, k1 + _W1
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def uniforms(words: np.ndarray) -> np.ndarray:
    """uint32 words → float32 in [0, 1): the upper 24 bits times 2^-24."""
    return (words >> np.uint32(8)).astype(np.float32) * _f(2.0**-24)


def normals(words: np.ndarray) -> np.ndarray:
    """uint32 [4, ...] → four standard normals, float32 [4, ...]: r(w0)·(cos, sin)(w1) and r(w2)·(cos, sin)(w3)."""
    out = []
    for w, angle in ((words[0], words[1]), (words[2], words[3])):
        radius = np.sqrt(_neg2log(w >> np.uint32(8)))
        out += [radius * trig for trig in _cos_sin(angle)]
    return np.stack(out)


def words(seed, sample_id, draw: int, stream: int, elements: int) -> np.ndarray:
    """Philox words of elements 0 … elements − 1 (in [C, H, W] order), uint32 [B, 4·⌈elements/4⌉].

    seed, sample_id: int64 [B]; any 64-bit seed, 0 <= sample_id < 2^56. draw: < 2^32. stream: one of STREAM's values.
    """
    blocks = _blocks(seed, sample_id, draw, stream, elements)
    return blocks.transpose(1, 2, 0).reshape(blocks.shape[1], 4 * blocks.shape[2])


def fill(shape, seed, sample_id, draw: int, stream: int = STREAM["sample"], kind: str = "normal") -> np.ndarray:
    """The noise of B samples, float32 [B, C, H, W]. kind: normal | uniform; the other arguments as for words()."""
    elements = int(np.prod(shape[1:]))
    values = {"normal": normals, "uniform": uniforms}[kind](_blocks(seed, sample_id, draw, stream, elements))
    return values.transpose(1, 2, 0).reshape(shape[0], 4 * values.shape[2])[:, :elements].reshape(shape)


def _blocks(seed, sample_id, draw: int, stream: int, elements: int) -> np.ndarray:
    """uint32 [4, B, ⌈elements/4⌉]."""
    key = np.atleast_1d(np.asarray(seed, np.int64)).view(np.uint64)[:, None]  # [B, 1]
    sample = np.atleast_1d(np.asarray(sample_id, np.int64)).view(np.uint64)[:, None]
    quad = np.arange((elements + 3) // 4, dtype=np.uint64)[None]  # element // 4
    counter = np.broadcast_arrays(_low(quad), np.uint32(draw), _low(sample), _high(sample) ^ np.uint32(stream))
    return philox4x32(np.stack(counter), np.stack([_low(key), _high(key)]))


def _low(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32)


def _high(x: np.ndarray) -> np.ndarray:
    return (x >> np.uint64(32)).astype(np.uint32)


def _neg2log(k: np.ndarray) -> np.ndarray:
    """−2·ln((k + 1)·2^-24) for k < 2^24, after Cephes' logf."""
    i = (k + np.uint32(1)).astype(np.float32).view(np.uint32) - np.uint32(0x3F3504F3)  # minus the bits of √½
    e = ((i.view(np.int32) >> 23) - 24).astype(np.float32)
    f = ((i & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3)).view(np.float32) - _f(1)  # m − 1, m in [√½, √2)
    z = f * f
    p = _f(_LOG[0])
    for c in _LOG[1:]:
        p = p * f + _f(c)
    y = f * z * p
    y = e * _f(-2.12194440e-4) + y
    y = z * _f(-0.5) + y
    return _f(-2) * (e * _f(0.693359375) + (f + y))


def _cos_sin(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of 2π·w/2^32: quadrant and remainder from the bits, Cephes' polynomials."""
    q = (w + np.uint32(0x20000000)) >> np.uint32(30)
    r = (w - (q << np.uint32(30))).view(np.int32)  # [−2^29, 2^29)
    x = (r >> 5).astype(np.float32) * _f(4.6813380050e-08)  # 2π/2^27
    z = x * x
    s = (_f(_SIN[0]) * z + _f(_SIN[1])) * z + _f(_SIN[2])
    s = s * (z * x) + x
    c = (_f(_COS[0]) * z + _f(_COS[1])) * z + _f(_COS[2])
    c = c * (z * z) + (z * _f(-0.5) + _f(1))
    odd = (q & np.uint32(1)).astype(bool)
    cos, sin = np.where(odd, s, c), np.where(odd, c, s)
    two, sign = np.uint32(2), np.uint32(30)
    cos = (cos.view(np.uint32) ^ (((q + np.uint32(1)) & two) << sign)).view(np.float32)
    return cos, (sin.view(np.uint32) ^ ((q & two) << sign)).view(np.float32)
