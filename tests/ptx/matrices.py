"""Matrices: 8×8 pieces between shared memory and the registers of a warp, and their products on the tensor cores.

Products are summed in float64 and rounded once to float32; a tensor core adds them in an order of its own, to fewer
bits.
"""

from __future__ import annotations

import re

import numpy as np

from tests.ptx import floats
from tests.ptx.copies import swizzled
from tests.ptx.machine import Machine, instruction
from tests.ptx.moves import addresses, write_shared
from tests.ptx.program import Immediate, Register
from tests.ptx.warps import whole_warps

THREAD = np.arange(32)
ROW, COLUMN = THREAD // 4, 2 * (THREAD % 4)  # what a thread of a warp holds of an 8×8 piece: two neighbours
DECODE = {"bf16": floats.from_bf16, "f16": floats.from_f16, "e4m3": floats.from_e4m3}
SWIZZLE = {1: 3, 2: 2, 3: 1}  # of a descriptor → of a tensor map


def _rows(m: Machine, operand, lanes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of ``count`` pieces: the byte index [warps, count, 8] of their rows, and the lane that gives each address."""
    warps = whole_warps(m, lanes)[:, : 8 * count]
    at = addresses(m, operand, lanes).reshape(-1, 32)[:, : 8 * count]
    index = m.shared.locate(m.block[warps], at, 16, m.text)
    return index.reshape(len(warps), count, 8), warps


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def load_pieces(m, i, lanes):
    """Thread 8·q + r gives the address of row r of piece q; every thread gets two neighbours of a row of each piece."""
    to = i.operands[0].items
    index, givers = _rows(m, i.operands[1], lanes, len(to))
    m.watch.read(m.watch.granules(index.reshape(-1), 16), givers.reshape(-1), m.text)
    pieces = m.shared.bytes.view(np.uint16)[index[..., None] // 2 + np.arange(8)].astype(np.uint32)
    if "trans" in i.parts:
        pieces = pieces.swapaxes(-1, -2)
    for q, register in enumerate(to):
        word = pieces[:, q, ROW, COLUMN] | pieces[:, q, ROW, COLUMN + 1] << np.uint32(16)
        m.write(register, word.reshape(-1), lanes)


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def store_pieces(m, i, lanes):
    given = i.operands[1].items
    index, givers = _rows(m, i.operands[0], lanes, len(given))
    pieces = np.zeros((len(index), len(given), 8, 8), np.uint16)
    for q, register in enumerate(given):
        word = m.read(register, np.uint32, lanes).reshape(-1, 32)
        pieces[:, q, ROW, COLUMN], pieces[:, q, ROW, COLUMN + 1] = word & 0xFFFF, word >> 16
    if "trans" in i.parts:
        pieces = pieces.swapaxes(-1, -2)
    value = np.ascontiguousarray(pieces).reshape(-1, 8).view(np.uint8)
    write_shared(m, index.reshape(-1), value, givers.reshape(-1))


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32")
def multiply(m, i, lanes):
    """[16, 16] · [16, 8] + [16, 8] of each warp."""
    warps, decode = whole_warps(m, lanes), DECODE[i.parts[-2]]
    to, a_words, b_words, c_words = (o.items for o in i.operands)
    a, b = np.zeros((len(warps), 16, 16), np.uint16), np.zeros((len(warps), 16, 8), np.uint16)
    for k, register in enumerate(a_words):
        word, row, column = m.read(register, np.uint32, lanes).reshape(-1, 32), ROW + 8 * (k % 2), COLUMN + 8 * (k // 2)
        a[:, row, column], a[:, row, column + 1] = word & 0xFFFF, word >> 16
    for k, register in enumerate(b_words):
        word, row = m.read(register, np.uint32, lanes).reshape(-1, 32), COLUMN + 8 * k
        b[:, row, ROW], b[:, row + 1, ROW] = word & 0xFFFF, word >> 16
    product = decode(a).astype(np.float64) @ decode(b).astype(np.float64)
    sums = [m.read(c, np.float32, lanes) for c in c_words]
    for k, (register, c) in enumerate(zip(to, sums, strict=True)):
        part = product[:, ROW + 8 * (k // 2), COLUMN + k % 2].reshape(-1)
        m.write(register, (part + c).astype(np.float32), lanes)


# Products of a warpgroup ----------------------------------------------------------------------------------------------


class _Products:
    """What the products of a warpgroup read: those not committed yet, and each group that is under way."""

    def __init__(self):
        self.open: list[np.ndarray] = []
        self.groups: list[list[np.ndarray]] = []


def _products(m: Machine, group: np.ndarray) -> _Products:
    return m.products.setdefault(int(group[0]), _Products())


@instruction(r"wgmma\.fence\.sync\.aligned")
def product_fence(m, i, lanes):
    whole_warps(m, lanes, 128)


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def commit_products(m, i, lanes):
    for group in whole_warps(m, lanes, 128):
        products = _products(m, group)
        products.groups.append(products.open)
        products.open = []


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def wait_for_products(m, i, lanes):
    """Until then they read shared memory: who overwrites it must come after."""
    for group in whole_warps(m, lanes, 128):
        products = _products(m, group)
        while len(products.groups) > i.operands[0].value:
            for at in products.groups.pop(0):
                m.watch.used[at] -= 1
                _read(m, at, group)


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k(16|32)\.f32\.(bf16\.bf16|e4m3\.e4m3)")
def multiply_asynchronously(m, i, lanes):
    """[64, K] · [N, K]ᵀ of each warpgroup, from shared memory, added to what the registers hold or in its place."""
    n, k = map(int, re.search(r"m64n(\d+)k(\d+)", i.opcode).groups())
    registers, first, second, added, *how = i.operands
    plain = how == [Immediate(1), Immediate(1), *[Immediate(0)] * (2 if i.type == "bf16" else 0)]
    m.refuse(not plain or not isinstance(first, Register), "signs, transposes or registers where none are known")
    for group in whole_warps(m, lanes, 128):
        a, b = (_operand(m, o, group, rows, k, i.type) for o, rows in ((first, 64), (second, n)))
        product = a @ b.T
        add = m.predicate(added, group) if isinstance(added, Register) else np.array([added.value != 0])
        m.refuse(add.any() != add.all(), "threads of a warpgroup do not agree")
        thread = np.arange(128)
        for at, register in enumerate(registers.items):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (at // 2 % 2)
            part = product[row, 8 * (at // 4) + 2 * (thread % 4) + at % 2]
            before = m.read(register, np.float32, group) if add.all() else 0
            m.write(register, (part + before).astype(np.float32), group)


def _operand(m: Machine, descriptor: Register, group: np.ndarray, rows: int, k: int, kind: str) -> np.ndarray:
    """float64 [rows, k] that a descriptor points to: eight rows after the other, each 32, 64 or 128 bytes, swizzled."""
    words = np.unique(m.read(descriptor, np.uint64, group))
    m.refuse(len(words) > 1, "threads of a warpgroup do not agree on a descriptor")
    word = int(words[0])
    start, stride, mode = (word & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, word >> 62
    m.refuse(mode == 0, "a matrix without a swizzle")
    width, row = {1: 128, 2: 64, 3: 32}[mode], np.arange(rows)[:, None]
    size = 1 if kind == "e4m3" else 2
    linear = start + row // 8 * stride + row % 8 * width + np.arange(k * size)
    offset = swizzled(linear, SWIZZLE[mode])
    m.refuse(offset.max() >= m.shared.size, "a matrix out of bounds")
    index = m.block[group[0]] * m.shared.stride + offset
    at = np.unique(index // m.watch.granule)
    _read(m, at, group)
    m.watch.used[at] += 1
    _products(m, group).open.append(at)
    found = np.ascontiguousarray(m.shared.bytes[index])
    return DECODE[kind](found if size == 1 else found.view(np.uint16)).astype(np.float64)


def _read(m: Machine, at: np.ndarray, group: np.ndarray) -> None:
    """On behalf of each warp."""
    leaders = group[::32]
    m.watch.read(np.broadcast_to(at, (len(leaders), len(at))), leaders, m.text)
