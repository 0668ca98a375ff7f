"""A few instructions by themselves, from registers to registers, for the tests."""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import Grid, Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import parse

HEAD = """
.extern .shared .align 16 .b8 shared[];
.entry snippet(.param .u64 p0, .param .align 64 .b8 p1[128])
{
    .reg .pred %p<16>;
    .reg .b16 %h<64>;
    .reg .b32 %r<256>;
    .reg .b64 %d<64>;
"""
WIDTH = {"p": np.uint8, "h": np.uint16, "r": np.uint32, "d": np.uint64}


def machine(
    text: str, threads: int = 32, blocks: int = 1, shared: int = 0, cluster: int = 1, memory=(), pointer: int = 0,
    maps=None, rough: bool = False, **registers,
) -> Machine:  # fmt: skip
    """It has run the text. registers: r1=values, repeated over the lanes; pointer: the parameter p0."""
    program = parse(HEAD + text + "\n}")
    given = pointer.to_bytes(8, "little").ljust(program.parameter_bytes, b"\0")
    grid = Grid(given, (blocks, 1), threads, shared, cluster, maps or {})
    m = Machine(program, grid, GlobalMemory(memory), [(x, 0) for x in range(0, blocks, cluster)], rough)
    for name, values in registers.items():
        values = np.atleast_1d(values)
        if values.dtype == bool:
            values = values.astype(np.uint8)
        kind = WIDTH[name[0]]
        bits = values.view(kind) if values.dtype.kind == "f" or values.itemsize == np.dtype(kind).itemsize else None
        if bits is None:
            bits = values.astype(np.int64).astype(kind)
        m.registers[f"%{name}"] = np.resize(bits, m.size)
    m.run()
    return m


def result(m: Machine, name: str, kind: type) -> np.ndarray:
    """A register in every lane."""
    return m.registers[f"%{name}"].view(kind)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)
