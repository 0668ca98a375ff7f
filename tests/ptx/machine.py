"""Runs a Program: the threads of many blocks are lanes, side by side; of those that can run the lowest pc goes first.

So threads that part meet again where their ways join, and one NumPy operation serves all that stand at an instruction.
Handlers of instructions are registered by the pattern of the opcode; an opcode that none takes is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

import numpy as np

from tests.ptx.floats import Approximation
from tests.ptx.memory import PARAMETERS, SHARED, WINDOW, GlobalMemory, SharedMemory
from tests.ptx.program import (
    BITS,
    BYTES,
    Fault,
    Immediate,
    Instruction,
    Not,
    Operand,
    Program,
    Register,
    Special,
    Symbol,
)
from tests.ptx.races import Clock, Watch

RUNNING, AT_BARRIER, AT_CLUSTER, AT_COPY, DONE = range(5)
LANES = 4096  # at most, unless one cluster has more
FAMILIES = ("arithmetic", "logic", "moves", "warps", "copies", "matrices")
_handlers: list[tuple[re.Pattern, Callable]] = []


def instruction(*patterns: str) -> Callable:
    """Registers handler(machine, instruction, lanes) for the opcodes that a pattern matches whole."""

    def register(handler: Callable) -> Callable:
        _handlers.extend((re.compile(pattern), handler) for pattern in patterns)
        return handler

    return register


@cache
def handler(opcode: str) -> Callable:
    for family in FAMILIES:
        import_module(f"tests.ptx.{family}")
    found = [handle for pattern, handle in _handlers if pattern.fullmatch(opcode)]
    if len(found) != 1:
        raise Fault(f"{'no' if not found else 'more than one'} instruction {opcode}")
    return found[0]


@dataclass(frozen=True)
class TensorMap:
    """What a kernel's parameter of 128 bytes stands for. Sizes outermost first, in elements of ``width`` bytes."""

    address: int
    shape: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int  # 0: none; 1, 2, 3: by 32, 64, 128 bytes
    width: int


@dataclass
class Grid:
    """A launch. parameters: bytes as they lie; maps: offset of a parameter → what it stands for."""

    parameters: bytes
    blocks: tuple[int, int]
    threads: int
    shared: int = 0
    cluster: int = 1  # blocks along x
    maps: dict[int, TensorMap] = field(default_factory=dict)


def run(program: Program, grid: Grid, memory: GlobalMemory, rough: bool = False, backwards: bool = False) -> int:
    """Every block; the number of instructions. rough: approximations as inexact as they may be."""
    width, height = grid.blocks
    if grid.threads % 32 or width % grid.cluster or len(grid.parameters) != program.parameter_bytes:
        raise Fault(f"{program.name}: {grid.threads} threads, {grid.blocks} blocks, {len(grid.parameters)} bytes")
    clusters = [(x, y) for y in range(height) for x in range(0, width, grid.cluster)]
    clusters = clusters[::-1] if backwards else clusters
    together = max(1, LANES // (grid.threads * grid.cluster))
    count = 0
    for i in range(0, len(clusters), together):
        machine = Machine(program, grid, memory, clusters[i : i + together], rough)
        try:
            count += machine.run()
        except Fault as fault:
            raise Fault(f"{program.name}, blocks from {clusters[i]} on: {fault}") from None
    return count


class Machine:
    """Some clusters of a grid. lanes: int64 indices, ascending; a lane's thread is lane % grid.threads."""

    def __init__(self, program: Program, grid: Grid, memory: GlobalMemory, clusters: list, rough: bool = False):
        self.program, self.grid, self.memory = program, grid, memory
        self.approximate = Approximation(rough)
        blocks = np.array([(x + rank, y) for x, y in clusters for rank in range(grid.cluster)], np.uint32)
        self.size = len(blocks) * grid.threads
        self.block = np.repeat(np.arange(len(blocks)), grid.threads)
        self.all = np.arange(self.size)
        self.registers: dict[str, np.ndarray] = {}
        self._immediates: dict[tuple[int, type], np.ndarray] = {}
        self.clock = Clock(self.size, self.block)
        self.shared = SharedMemory(len(blocks), grid.shared)
        self.watch = Watch(len(self.shared.bytes), self._granule(), self.clock)
        self.state = np.zeros(self.size, np.int8)
        self.resume = np.zeros(self.size, np.int64)  # where a lane that waits goes on
        self.groups: dict[int, np.ndarray] = {}  # pc → the lanes that are there
        self.barriers, self.copies, self.products = {}, [], {}  # copies.py and matrices.py
        self.events = self.looked = 0  # of mbarriers, and when those who wait last looked
        self.committed = np.zeros(self.size, np.int64)  # groups of copies that each lane has closed
        self.text = ""
        self.special = {
            "%tid.x": np.tile(np.arange(grid.threads, dtype=np.uint32), len(blocks)),
            "%ctaid.x": blocks[self.block, 0],
            "%ctaid.y": blocks[self.block, 1],
            "%nctaid.x": np.full(self.size, grid.blocks[0], np.uint32),
            "%nctaid.y": np.full(self.size, grid.blocks[1], np.uint32),
            "%cluster_ctarank": (self.block % grid.cluster).astype(np.uint32),
        }

    def _granule(self) -> int:
        """The narrowest access to shared memory, of at most a word."""
        kinds = [i for i in self.program.code if i.parts[0] in ("ld", "st") and "shared" in ".".join(i.parts)]
        return min([4, *(BYTES[i.type] for i in kinds)])

    # Scheduling -------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        code, count = self.program.code, 0
        self.groups = {0: self.all}
        with np.errstate(all="ignore"):
            while True:
                while not self.groups:
                    if (self.state == DONE).all():
                        return count
                    if not self._release():
                        self._deadlock()
                pc = min(self.groups)
                lanes = self.groups.pop(pc)
                stop = min(self.groups, default=len(code))
                while lanes is not None and pc < len(code):
                    count += 1
                    i = code[pc]
                    self.text = i.text
                    pc, lanes = self._step(i, pc, lanes)
                    if pc >= stop or (self.groups and pc >= min(self.groups)):
                        break
                if lanes is not None:
                    self._join(pc, lanes)

    def _step(self, i: Instruction, pc: int, lanes: np.ndarray) -> tuple[int, np.ndarray | None]:
        """Where the lanes that go on are then."""
        acting = lanes
        if i.guard is not None:
            guard = self.predicate(i.guard, lanes) ^ i.negated
            acting = lanes if guard.all() else lanes[guard]
        if i.target is not None:
            if len(acting) == len(lanes):
                return i.target, lanes
            if len(acting):
                self._join(i.target, acting)
                lanes = lanes[~guard]
            return pc + 1, lanes
        if len(acting) == 0:
            return pc + 1, lanes
        self.resume[acting] = pc + 1
        handler(i.opcode)(self, i, acting)
        going = self.state[lanes] == RUNNING
        return pc + 1, lanes if going.all() else lanes[going] if going.any() else None

    def _join(self, pc: int, lanes: np.ndarray) -> None:
        if pc >= len(self.program.code):
            return self.finish(lanes)
        there = self.groups.get(pc)
        self.groups[pc] = lanes if there is None else np.sort(np.concatenate([there, lanes]))

    def finish(self, lanes: np.ndarray) -> None:
        """The lanes end. A block that ends with peers in its cluster leaves them nothing to read."""
        self.state[lanes] = DONE
        for block in np.unique(self.block[lanes]) if self.grid.cluster > 1 else ():
            cells = self.shared.stride // self.watch.granule
            own = lanes[self.block[lanes] == block][0]
            self.watch.leave(np.arange(block * cells, (block + 1) * cells), own, self.text)

    def wait(self, lanes: np.ndarray, state: int, again: bool = False) -> None:
        """The lanes stop here; again: and do the same instruction again when they go on."""
        self.state[lanes] = state
        self.resume[lanes] -= again

    def go(self, lanes: np.ndarray) -> None:
        self.state[lanes] = RUNNING
        for pc in np.unique(self.resume[lanes]):
            self._join(int(pc), lanes[self.resume[lanes] == pc])

    def _release(self) -> bool:
        """Lets go whoever waits at a barrier that all have reached."""
        from tests.ptx import copies, warps

        return warps.release(self) | copies.release(self)

    def _deadlock(self) -> None:
        waiting = self.all[self.state != DONE]
        where = {self.program.code[pc - (self.state[waiting[0]] != AT_COPY)].text for pc in self.resume[waiting]}
        raise Fault(f"{len(waiting)} threads wait for ever at {sorted(where)[:3]}; {self.size - len(waiting)} are done")

    # Operands ---------------------------------------------------------------------------------------------------------

    def at(self, lanes: np.ndarray) -> slice | np.ndarray:
        return slice(None) if len(lanes) == self.size else lanes

    def register(self, r: Register) -> np.ndarray:
        """Its bits in every lane."""
        found = self.registers.get(r.name)
        if found is None:
            found = self.registers[r.name] = np.zeros(self.size, BITS[r.bytes])
        return found

    def read(self, operand: Operand, kind: type, lanes: np.ndarray) -> np.ndarray:
        """The operand's bits as NumPy's ``kind``: [lanes], or [1] of a constant."""
        if isinstance(operand, Register):
            bits = self.register(operand)[self.at(lanes)]
            size = np.dtype(kind).itemsize
            return (bits if bits.itemsize == size else bits.astype(BITS[size])).view(kind)
        if isinstance(operand, Special):
            if operand.name not in self.special:
                raise Fault(f"no special register {operand.name}")
            return self.special[operand.name][self.at(lanes)].view(kind)
        return self._constant(operand, kind)

    def _constant(self, operand: Immediate | Symbol, kind: type) -> np.ndarray:
        key = operand, kind
        if key not in self._immediates:
            width = 8 * np.dtype(kind).itemsize
            value = operand.value if isinstance(operand, Immediate) else self.address_of(operand)
            self._immediates[key] = np.array([value & (1 << width) - 1], BITS[width // 8]).view(kind)
        return self._immediates[key]

    @staticmethod
    def address_of(symbol: Symbol) -> int:
        """Within its own space."""
        return symbol.offset

    def refuse(self, wrong: bool, what: str) -> None:
        if wrong:
            raise Fault(f"{self.text}: {what}")

    def predicate(self, operand: Operand, lanes: np.ndarray) -> np.ndarray:
        if isinstance(operand, Not):
            return ~self.predicate(operand.predicate, lanes)
        return self.read(operand, np.uint8, lanes).astype(bool)

    def write(self, operand: Operand, value: np.ndarray, lanes: np.ndarray) -> None:
        """A narrower value is extended by its sign if its kind has one; bool is a predicate."""
        if operand is None:
            return
        to = self.register(operand)
        if value.dtype == bool:
            value = value.view(np.uint8)
        if value.itemsize < to.itemsize and value.dtype.kind in "iu":
            value = value.astype(np.dtype(f"{value.dtype.kind}{to.itemsize}"))
        if value.itemsize != to.itemsize:
            raise Fault(f"{self.text}: {value.dtype} for a register of {to.itemsize} bytes")
        to[self.at(lanes)] = value.view(to.dtype)

    def generic(self, address: np.ndarray) -> str:
        """The space of generic addresses, all of one."""
        for space, first in (("param", PARAMETERS), ("shared", SHARED), ("global", 0)):
            inside = address >= first
            if inside.all():
                return space
            if inside.any():
                break
        raise Fault(f"{self.text}: generic addresses of several spaces at once")

    def own_window(self, lanes: np.ndarray) -> np.ndarray:
        """The generic address of each lane's own shared memory, int64."""
        return SHARED + self.block[lanes] * WINDOW
