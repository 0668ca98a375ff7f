"""Number formats and roundings that NumPy has not, all correctly rounded, and how inexact an approximation may be."""

from __future__ import annotations

import numpy as np

F32, F64, U16, U32 = np.float32, np.float64, np.uint16, np.uint32


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → bits, to nearest even; every NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(x, F32).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded.astype(U16))


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.astype(U16).view(np.float16).astype(F32)


def to_f16(x: np.ndarray) -> np.ndarray:
    """float32 → bits, to nearest even; every NaN becomes 0x7fff."""
    return np.where(np.isnan(x), U16(0x7FFF), x.astype(np.float16).view(U16))


def _e4m3_values() -> np.ndarray:
    """The value of each byte: sign, 4 bits of exponent with bias 7, 3 of mantissa; S.1111.111 is NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -size, size).astype(F32)


E4M3 = _e4m3_values()


def from_e4m3(byte: np.ndarray) -> np.ndarray:
    return E4M3[byte]


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """float32 → byte, to nearest even, at most ±448; NaN → 0x7f."""
    size = np.minimum(np.abs(x.astype(F64)), 448)
    _, exponent = np.frexp(np.where(size == 0, 1, size))  # size = fraction · 2^exponent, fraction in [0.5, 1)
    step = 2.0 ** (np.maximum(exponent, -5) - 4)
    byte = np.searchsorted(E4M3[:127], np.rint(size / step) * step).astype(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), byte | np.signbit(x).astype(np.uint8) << np.uint8(7))


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, an inexact sum rounded to the neighbour with an odd last bit: rounding it again is exact."""
    total = a + b
    there = total - a
    lost = (a - (total - there)) + (b - there)
    bits = total.view(np.int64)
    towards = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    inexact = (lost != 0) & np.isfinite(total) & ((bits & 1) == 0)
    return np.where(inexact, towards, total)


def _narrow_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 → float32, likewise."""
    near = x.astype(F32)
    other = np.nextafter(near, np.where(x > near, F32(np.inf), F32(-np.inf)))
    inexact = (near != x) & np.isfinite(near) & ((near.view(U32) & U32(1)) == 0)
    return np.where(inexact, other, near)


def fma_of_halves(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a·b + c of values of 16 bits: to be rounded to 16 bits, and then rounded once in all."""
    return _narrow_to_odd(_sum_to_odd(*np.broadcast_arrays(a.astype(F64) * b, c.astype(F64))))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, down: bool = False) -> np.ndarray:
    """float32 a·b + c rounded once, to nearest even or down."""
    exact = _sum_to_odd(*np.broadcast_arrays(a.astype(F64) * b.astype(F64), c.astype(F64)))
    near = exact.astype(F32)
    if not down:
        return near
    return np.where(near.astype(F64) > exact, np.nextafter(near, F32(-np.inf)), near)


class Approximation:
    """How exact the approximate instructions are: correctly rounded, or as far off as the PTX manual lets them be.

    The manual's limits, for float32: ex2 and div (approx and full) 2 ulps, rcp 1 ulp, rsqrt 2^−22.9 of the value.
    """

    def __init__(self, rough: bool = False):
        self.rough = rough

    def ulps(self, x: np.ndarray, limit: int) -> np.ndarray:
        """x float64 → float32, at most ``limit`` ulps off, by a hash of its bits: the same for the same x."""
        near = x.astype(F32)
        if not self.rough:
            return near
        shift = self._hash(near) % U32(2 * limit - 1)  # −(limit − 1) … limit − 1: near is half an ulp off itself
        moved = (near.view(np.int32) + shift.astype(np.int32) - np.int32(limit - 1)).view(F32)
        usual = np.isfinite(near) & (np.abs(near) > 2.0**-120) & (np.abs(near) < 2.0**120)
        return np.where(usual, moved, near)

    def relative(self, x: np.ndarray, limit: float) -> np.ndarray:
        """x float64 → float32, off by at most ``limit`` of itself."""
        near = x.astype(F32)
        if not self.rough:
            return near
        part = self._hash(near).astype(F64) / 2**31 - 1
        return np.where(np.isfinite(near), x * (1 + part * (limit - 2.0**-24)), x).astype(F32)

    @staticmethod
    def _hash(x: np.ndarray) -> np.ndarray:
        h = x.view(U32) * U32(2654435761)
        return (h ^ h >> U32(15)) * U32(2246822519)
