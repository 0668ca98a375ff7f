"""Sums, products, quotients, powers of two, roots, minima, in integers, float32, and two 16-bit floats in a word."""

from __future__ import annotations

import numpy as np

from tests.ptx import floats
from tests.ptx.machine import Machine, instruction
from tests.ptx.program import Instruction

KIND = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}
KIND |= {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32, "b8": np.uint8, "u8": np.uint8}
WIDER = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
INTEGER = "[us](16|32|64)"
FORMATS = {"bf16": (floats.from_bf16, floats.to_bf16), "f16": (floats.from_f16, floats.to_f16)}


def inputs(m: Machine, i: Instruction, lanes: np.ndarray, count: int = 2, kind: type | None = None) -> list[np.ndarray]:
    return [m.read(operand, kind or KIND[i.type], lanes) for operand in i.operands[1 : 1 + count]]


@instruction(rf"(add|sub|mul\.lo)\.{INTEGER}", r"(add|sub|mul)\.(rn\.)?f32")
def binary(m: Machine, i: Instruction, lanes: np.ndarray) -> None:
    m.write(i.operands[0], BINARY[i.parts[0]](*inputs(m, i, lanes)), lanes)


@instruction(r"mad\.lo\.s(16|32|64)")
def multiply_add(m, i, lanes):
    a, b, c = inputs(m, i, lanes, 3)
    m.write(i.operands[0], a * b + c, lanes)


@instruction(r"(mul|mad)\.wide\.[us](16|32)")
def wide(m, i, lanes):
    kind = WIDER[i.type]
    a, b = inputs(m, i, lanes)
    product = a.astype(kind) * b.astype(kind)
    m.write(i.operands[0], product if i.parts[0] == "mul" else product + m.read(i.operands[3], kind, lanes), lanes)


@instruction(r"mul\.hi\.(u16|u32|s32)")
def upper_half(m, i, lanes):
    kind = WIDER[i.type]
    a, b = inputs(m, i, lanes)
    m.write(i.operands[0], (a.astype(kind) * b.astype(kind) >> kind(8 * a.itemsize)).astype(a.dtype), lanes)


@instruction(r"mul\.hi\.[us]64")
def upper_half_of_128_bits(m, i, lanes):
    a, b = np.broadcast_arrays(*inputs(m, i, lanes))
    m.write(i.operands[0], np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], a.dtype), lanes)


@instruction(r"div\.[us](32|64)", r"rem\.[us]32")
def integer_quotient(m, i, lanes):
    """Towards 0, as the sign of a remainder says; by 0 it is unspecified, and here a fault."""
    a, b = inputs(m, i, lanes)
    m.refuse((b == 0).any(), "a division by 0")
    rest = np.fmod(a, b)
    m.write(i.operands[0], rest if i.parts[0] == "rem" else (a - rest) // b, lanes)


@instruction(r"fma\.(rn|rm)\.f32")
def fused(m, i, lanes):
    m.write(i.operands[0], floats.fma(*inputs(m, i, lanes, 3), down=i.parts[1] == "rm"), lanes)


@instruction(r"(add|fma)\.rn\.(bf16|f16)(x2)?")
def halves(m, i, lanes):
    """16-bit floats, two to a word or one. The sum of two is exact enough in float32: it is rounded as if once."""
    decode, encode = FORMATS[i.type.removesuffix("x2")]
    kind = np.uint32 if i.type.endswith("x2") else np.uint16
    words = inputs(m, i, lanes, 3 if i.parts[0] == "fma" else 2, kind)
    result = kind(0)
    for shift in range(0, 8 * kind().itemsize, 16):
        a, b, *c = (decode((w >> kind(shift) & kind(0xFFFF)).astype(np.uint16)) for w in words)
        total = floats.fma_of_halves(a, b, c[0]) if c else a + b
        result = result | encode(total).astype(kind) << kind(shift)
    m.write(i.operands[0], result, lanes)


@instruction(r"div\.(rn|full|approx)\.f32")
def quotient(m, i, lanes):
    a, b = inputs(m, i, lanes)
    exact = a / b if i.parts[1] == "rn" else m.approximate.ulps(a.astype(np.float64) / b, 2)
    m.write(i.operands[0], exact, lanes)


@instruction(r"rcp\.rn\.f32")
def reciprocal(m, i, lanes):
    m.write(i.operands[0], np.float32(1) / inputs(m, i, lanes, 1)[0], lanes)


@instruction(r"sqrt\.rn\.f32")
def root(m, i, lanes):
    m.write(i.operands[0], np.sqrt(inputs(m, i, lanes, 1)[0]), lanes)


@instruction(r"rsqrt\.approx(\.ftz)?\.f32")
def reciprocal_root(m, i, lanes):
    x = _flushed(i, inputs(m, i, lanes, 1)[0])
    m.write(i.operands[0], m.approximate.relative(1 / np.sqrt(x.astype(np.float64)), 2.0**-22.9), lanes)


@instruction(r"ex2\.approx(\.ftz)?\.f32")
def power_of_two(m, i, lanes):
    x = _flushed(i, inputs(m, i, lanes, 1)[0])
    m.write(i.operands[0], _flushed(i, m.approximate.ulps(np.exp2(x.astype(np.float64)), 2)), lanes)


def _flushed(i: Instruction, x: np.ndarray) -> np.ndarray:
    """With .ftz what is subnormal is 0, of the same sign."""
    if "ftz" not in i.parts:
        return x
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


@instruction(r"(neg|abs)\.(f32|s32)")
def sign(m, i, lanes):
    x = inputs(m, i, lanes, 1)[0]
    m.write(i.operands[0], -x if i.parts[0] == "neg" else np.abs(x), lanes)


@instruction(r"(min|max)\.(u32|s32|f32)", r"(min|max)\.NaN\.f32")
def extreme(m, i, lanes):
    """Of floats: a NaN gives way to a number, unless .NaN is said."""
    least, most = (np.minimum, np.maximum) if "NaN" in i.parts or i.type != "f32" else (np.fmin, np.fmax)
    m.write(i.operands[0], (least if i.parts[0] == "min" else most)(*inputs(m, i, lanes)), lanes)


@instruction(r"max\.relu\.s32")
def extreme_or_zero(m, i, lanes):
    m.write(i.operands[0], np.maximum(np.maximum(*inputs(m, i, lanes)), np.int32(0)), lanes)


@instruction(r"min\.NaN\.xorsign\.abs\.f32")
def smaller_size(m, i, lanes):
    """The smaller size, with the product of the signs."""
    a, b = inputs(m, i, lanes)
    size = np.minimum(np.abs(a), np.abs(b))
    m.write(i.operands[0], np.where(np.signbit(a) ^ np.signbit(b), -size, size), lanes)
