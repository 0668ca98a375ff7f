"""Bits, comparisons and selection."""

from __future__ import annotations

import numpy as np

from tests.ptx.arithmetic import FORMATS, KIND, inputs
from tests.ptx.machine import instruction
from tests.ptx.program import Pair

BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARE |= {"ge": np.greater_equal}


@instruction(r"(and|or|xor)\.b(16|32|64)")
def bitwise(m, i, lanes):
    m.write(i.operands[0], BITWISE[i.parts[0]](*inputs(m, i, lanes)), lanes)


@instruction(r"(and|or|xor)\.pred")
def predicates(m, i, lanes):
    m.write(i.operands[0], BITWISE[i.parts[0]](*(m.predicate(o, lanes) for o in i.operands[1:])), lanes)


@instruction(r"not\.b(16|32|64)", r"not\.pred")
def complement(m, i, lanes):
    value = m.predicate(i.operands[1], lanes) if i.type == "pred" else inputs(m, i, lanes, 1)[0]
    m.write(i.operands[0], ~value, lanes)


@instruction(r"shl\.b(16|32|64)", r"shr\.[us](16|32|64)")
def shift(m, i, lanes):
    """By more than the width: nothing is left, but of a signed number its sign."""
    x, by = inputs(m, i, lanes, 1)[0], m.read(i.operands[2], np.uint32, lanes)
    width = np.uint32(8 * x.itemsize)
    most = np.minimum(by, width - np.uint32(1)).astype(x.dtype)
    moved = x << most if i.parts[0] == "shl" else x >> most
    m.write(i.operands[0], moved if x.dtype.kind == "i" else np.where(by < width, moved, x.dtype.type(0)), lanes)


@instruction(r"bfe\.[us]32")
def extract(m, i, lanes):
    """``length`` bits from ``position`` on; of a signed number the last of them is its sign."""
    x = inputs(m, i, lanes, 1)[0]
    position, length = (m.read(o, np.uint32, lanes).astype(np.int64) & 255 for o in i.operands[2:4])
    wide = x.astype(np.int64) >> np.minimum(position, 63)  # beyond the number is its sign
    field = wide & (np.int64(1) << np.minimum(length, 32)) - 1
    if i.type == "s32":
        sign = np.where(length > 0, field >> np.maximum(np.minimum(length, 32) - 1, 0) & 1, 0)
        field = field - (sign << np.minimum(length, 32))
    m.write(i.operands[0], field.astype(np.uint32), lanes)


@instruction(r"setp\.(eq|ne|lt|le|gt|ge)\.[usb](16|32|64)", r"setp\.(eq|ne|lt|le|gt|ge)u?\.f32")
def compare(m, i, lanes):
    """Of floats: with a NaN it is false, and true with a u; ne is of ordered numbers too."""
    a, b = inputs(m, i, lanes)
    how = i.parts[1]
    if i.type != "f32":
        return m.write(i.operands[0], COMPARE[how](a, b), lanes)
    unordered = np.isnan(a) | np.isnan(b)
    result = COMPARE[how[:2]](a, b)
    m.write(i.operands[0], result | unordered if how.endswith("u") else result & ~unordered, lanes)


@instruction(r"setp\.(num|nan)\.f32")
def is_number(m, i, lanes):
    a, b = inputs(m, i, lanes)
    unordered = np.isnan(a) | np.isnan(b)
    m.write(i.operands[0], unordered if i.parts[1] == "nan" else ~unordered, lanes)


@instruction(r"setp\.(lt|le|gt|ge)\.(bf16|f16)(x2)?")
def compare_halves(m, i, lanes):
    """p, or p|q of the lower and of the upper half."""
    decode, both = FORMATS[i.type.removesuffix("x2")][0], i.type.endswith("x2")
    kind = np.uint32 if both else np.uint16
    words = inputs(m, i, lanes, 2, kind)
    m.refuse(both != isinstance(i.operands[0], Pair), "one result of two comparisons, or two of one")
    results = (i.operands[0].first, i.operands[0].second) if both else (i.operands[0],)
    for k, result in enumerate(results):
        a, b = (decode((w >> kind(16 * k) & kind(0xFFFF)).astype(np.uint16)) for w in words)
        m.write(result, np.broadcast_to(COMPARE[i.parts[1]](a, b), lanes.shape).copy(), lanes)


@instruction(r"prmt\.b32")
def permute(m, i, lanes):
    """Four of the eight bytes b:a, each as a digit of the selector says; with 8 added, its sign in every bit."""
    a, b, selector = (x.astype(np.uint64) for x in inputs(m, i, lanes, 3))
    both, result = b << np.uint64(32) | a, np.uint64(0)
    for k in range(4):
        digit = selector >> np.uint64(4 * k) & np.uint64(15)
        byte = both >> np.uint64(8) * (digit & np.uint64(7)) & np.uint64(255)
        byte = np.where(digit > 7, np.where(byte > 127, np.uint64(255), np.uint64(0)), byte)
        result = result | byte << np.uint64(8 * k)
    m.write(i.operands[0], result.astype(np.uint32), lanes)


@instruction(r"selp\.[bu](16|32|64)", r"selp\.f32")
def select(m, i, lanes):
    a, b = inputs(m, i, lanes, 2, KIND[i.type])
    m.write(i.operands[0], np.where(m.predicate(i.operands[3], lanes), a, b), lanes)
