"""Moves, conversions, and what reads and writes memory."""

from __future__ import annotations

import numpy as np

from tests.ptx import floats
from tests.ptx.arithmetic import KIND, inputs
from tests.ptx.machine import Machine, instruction
from tests.ptx.memory import FIRST, PARAMETERS, SHARED, WINDOW
from tests.ptx.program import BITS, BYTES, Address, Instruction, Pack

ROUND = {"rni": np.rint}
SIGNED = {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}


@instruction(r"mov\.[bu](16|32|64)", r"mov\.f32")
def move(m, i, lanes):
    """Also {a, b} ↔ one register, the first in its lower bits."""
    to, value = i.operands
    width = BYTES[i.type]
    if isinstance(value, Pack):
        part = 8 * width // len(value.items)
        bits = sum(
            m.read(v, BITS[part // 8], lanes).astype(np.uint64) << np.uint64(k * part)
            for k, v in enumerate(value.items)
        )
        bits = bits.astype(BITS[width])
    else:
        bits = m.read(value, BITS[width], lanes)
    if not isinstance(to, Pack):
        return m.write(to, bits, lanes)
    part = 8 * width // len(to.items)
    for k, item in enumerate(to.items):
        m.write(item, (bits >> bits.dtype.type(k * part)).astype(BITS[part // 8]), lanes)


@instruction(r"mov\.pred")
def move_predicate(m, i, lanes):
    value = i.operands[1]
    m.write(i.operands[0], m.read(value, np.uint8, lanes).astype(bool), lanes)


# Conversions ----------------------------------------------------------------------------------------------------------


@instruction(r"cvt\.[us](16|32|64)\.[us](16|32|64)")
def convert_integer(m, i, lanes):
    m.write(i.operands[0], inputs(m, i, lanes, 1)[0].astype(KIND[i.parts[-2]]), lanes)


@instruction(r"cvt\.rn\.f32\.[us]32")
def from_integer(m, i, lanes):
    m.write(i.operands[0], inputs(m, i, lanes, 1)[0].astype(np.float32), lanes)


@instruction(r"cvt\.f32\.(bf16|f16)")
def from_half(m, i, lanes):
    decode = floats.from_bf16 if i.type == "bf16" else floats.from_f16
    m.write(i.operands[0], decode(m.read(i.operands[1], np.uint16, lanes)), lanes)


@instruction(r"cvt\.rn\.(bf16|f16)\.f32")
def to_half(m, i, lanes):
    encode = floats.to_bf16 if i.parts[-2] == "bf16" else floats.to_f16
    m.write(i.operands[0], encode(inputs(m, i, lanes, 1)[0]), lanes)


@instruction(r"cvt\.rn\.(bf16x2|f16x2)\.f32")
def to_halves(m, i, lanes):
    """The first operand becomes the upper half."""
    encode = floats.to_bf16 if i.parts[-2] == "bf16x2" else floats.to_f16
    high, low = (encode(x).astype(np.uint32) for x in inputs(m, i, lanes))
    m.write(i.operands[0], high << np.uint32(16) | low, lanes)


@instruction(r"cvt\.rn\.satfinite\.e4m3x2\.f32")
def to_float8(m, i, lanes):
    high, low = (floats.to_e4m3(x).astype(np.uint16) for x in inputs(m, i, lanes))
    m.write(i.operands[0], high << np.uint16(8) | low, lanes)


@instruction(r"cvt\.rn\.f16x2\.e4m3x2")
def from_float8(m, i, lanes):
    both = m.read(i.operands[1], np.uint16, lanes)
    low, high = (floats.to_f16(floats.from_e4m3(x)).astype(np.uint32) for x in (both & 255, both >> 8))
    m.write(i.operands[0], high << np.uint32(16) | low, lanes)


@instruction(r"cvt\.sat\.f32\.f32")
def to_unit_interval(m, i, lanes):
    x = inputs(m, i, lanes, 1)[0]
    m.write(i.operands[0], np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1))), lanes)


@instruction(r"cvt\.rni\.f32\.f32")
def to_whole(m, i, lanes):
    m.write(i.operands[0], np.rint(inputs(m, i, lanes, 1)[0]), lanes)


# Addresses ------------------------------------------------------------------------------------------------------------


@instruction(r"cvta\.to\.global\.u64")
def to_global(m, i, lanes):
    m.write(i.operands[0], inputs(m, i, lanes, 1)[0], lanes)


@instruction(r"cvta\.shared\.u64")
def shared_to_generic(m, i, lanes):
    offset = inputs(m, i, lanes, 1)[0].astype(np.int64)
    m.write(i.operands[0], (m.own_window(lanes) + offset).astype(np.uint64), lanes)


@instruction(r"cvta\.param\.u64")
def parameter_to_generic(m, i, lanes):
    m.write(i.operands[0], inputs(m, i, lanes, 1)[0] + np.uint64(PARAMETERS), lanes)


@instruction(r"mapa\.u64")
def map_to_peer(m, i, lanes):
    """The same place in the shared memory of another block of the cluster."""
    address = m.read(i.operands[1], np.uint64, lanes).astype(np.int64) - SHARED
    rank = m.read(i.operands[2], np.uint32, lanes).astype(np.int64)
    m.refuse((rank >= m.grid.cluster).any(), f"a rank beyond the cluster's {m.grid.cluster} blocks")
    m.refuse((address < 0).any(), "an address that is not of shared memory")
    block = m.block[lanes] // m.grid.cluster * m.grid.cluster + rank
    m.write(i.operands[0], (SHARED + block * WINDOW + address % WINDOW).astype(np.uint64), lanes)


def addresses(m: Machine, a: Address, lanes: np.ndarray) -> np.ndarray:
    """int64 [lanes], within the space of the instruction."""
    base = m.read(a.base, np.uint64, lanes).astype(np.int64) + a.offset
    return np.broadcast_to(base, lanes.shape)


def space(m: Machine, i: Instruction, at: np.ndarray, lanes: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """(param | global | shared, the blocks whose shared memory it is, addresses within the space)."""
    named = [part for part in i.parts if part in ("param", "global", "shared")]
    block = m.block[lanes]
    if named:
        return named[0], block, at
    found = m.generic(at)
    if found == "shared":
        return found, (at - SHARED) // WINDOW, (at - SHARED) % WINDOW
    return found, block, at - PARAMETERS if found == "param" else at


# Memory ---------------------------------------------------------------------------------------------------------------

_LOAD = r"(\.volatile)?(\.param|\.global|\.shared)?(\.v[24])?\.([busf](8|16|32|64))"


@instruction("ld" + _LOAD)
def load(m, i, lanes):
    to = i.operands[0].items if isinstance(i.operands[0], Pack) else (i.operands[0],)
    width = BYTES[i.type]
    where, block, at = space(m, i, addresses(m, i.operands[1], lanes), lanes)
    for register, value in zip(to, read_memory(m, where, block, at, width, len(to), lanes), strict=True):
        m.write(register, value.view(SIGNED.get(i.type, value.dtype)), lanes)


@instruction("st" + _LOAD)
def store(m, i, lanes):
    given = i.operands[1].items if isinstance(i.operands[1], Pack) else (i.operands[1],)
    width = BYTES[i.type]
    values = [np.broadcast_to(m.read(v, BITS[width], lanes), lanes.shape) for v in given]
    where, block, at = space(m, i, addresses(m, i.operands[0], lanes), lanes)
    m.refuse(where == "param", "a store to a parameter")
    write_memory(m, where, block, at, values, lanes)


def read_memory(
    m: Machine, where: str, block: np.ndarray, at: np.ndarray, width: int, count: int, lanes: np.ndarray
) -> list[np.ndarray]:
    """``count`` consecutive values of ``width`` bytes a lane."""
    if where == "global":
        m.memory.check(at, width * count, m.text)
        memory, first = m.memory.view(width), (at - FIRST) // width
    elif where == "shared":
        index = m.shared.locate(block, at, width * count, m.text)
        m.watch.read(m.watch.granules(index, width * count), lanes, m.text)
        memory, first = m.shared.bytes.view(BITS[width]), index // width
    else:
        m.refuse(((at < 0) | (at + width * count > len(m.grid.parameters))).any(), "no such parameter")
        memory, first = (
            np.frombuffer(m.grid.parameters[: len(m.grid.parameters) // width * width], BITS[width]),
            at // width,
        )
        m.refuse((at % width).any(), "a misaligned parameter")
    return [memory[first + k] for k in range(count)]


def write_memory(
    m: Machine, where: str, block: np.ndarray, at: np.ndarray, values: list[np.ndarray], lanes: np.ndarray
) -> None:
    width = values[0].itemsize
    size = width * len(values)
    if where == "global":
        m.memory.check(at, size, m.text)
        memory, first = m.memory.view(width), (at - FIRST) // width
    else:
        index = m.shared.locate(block, at, size, m.text)
        write_shared(m, index, np.stack(values, 1).view(np.uint8), lanes)
        return
    for k, value in enumerate(values):
        memory[first + k] = value


def write_shared(m: Machine, index: np.ndarray, value: np.ndarray, lanes: np.ndarray) -> None:
    """value: uint8 [n, size], to byte index [n] of shared memory, checked and noted."""
    at = m.watch.granules(index, value.shape[1])
    word = BITS[m.watch.granule]
    cells = m.shared.bytes.view(word)
    given = np.ascontiguousarray(value).view(word)
    m.watch.write(at, lanes, m.text, lambda: cells[at] == given)
    cells[at] = given
    m.refuse((cells[at] != given).any(), "race: threads of one instruction write different values to one place")


@instruction(r"atom\.global(\.gpu\.relaxed)?\.(add\.u64|min\.s64|exch\.b64)")
def atomic(m, i, lanes):
    """One lane after the other."""
    at = addresses(m, i.operands[1], lanes)
    m.memory.check(at, 8, m.text)
    kind = np.int64 if i.type == "s64" else np.uint64
    memory, given = m.memory.view(8).view(kind), np.broadcast_to(m.read(i.operands[2], kind, lanes), lanes.shape)
    before = np.empty(len(lanes), kind)
    for k, index in enumerate((at - FIRST) // 8):
        before[k] = memory[index]
        memory[index] = {"add": before[k] + given[k], "min": min(before[k], given[k]), "exch": given[k]}[i.parts[-2]]
    m.write(i.operands[0], before, lanes)
