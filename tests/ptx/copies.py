"""Asynchronous copies to shared memory, and the mbarriers that tell of them.

A copy overwrites its destination from the moment it is issued on, and brings its values as late as it may: when
somebody waits for it. So what is read without the wait is found, and what is overwritten too early is too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.ptx.machine import AT_COPY, Machine, TensorMap, instruction
from tests.ptx.memory import FIRST, PARAMETERS
from tests.ptx.moves import addresses
from tests.ptx.program import Fault, Operand

ROW = {1: 32, 2: 64, 3: 128}  # bytes that a swizzle works on
TURN = {1: 1, 2: 3, 3: 7}  # which of the 16-byte pieces of a row change places


def swizzled(offset: np.ndarray, mode: int) -> np.ndarray:
    """Where bytes of shared memory lie: bits 4 … of the offset are turned by its bits 7 …"""
    return offset ^ (offset >> 7 & TURN[mode]) << 4 if mode else offset


# cp.async -------------------------------------------------------------------------------------------------------------


@dataclass
class _Copies:
    """What one instruction has asked for: of each lane, where to, the bytes, and the group that tells of it."""

    lanes: np.ndarray
    index: np.ndarray
    value: np.ndarray  # uint8 [n, size]
    group: np.ndarray


@instruction(r"cp\.async\.(ca|cg)\.shared\.global")
def copy(m, i, lanes):
    """[to], [from], size, bytes that are read: the rest is 0."""
    size = i.operands[2].value
    to, source = (addresses(m, o, lanes) for o in i.operands[:2])
    given = m.read(i.operands[3], np.uint32, lanes) if len(i.operands) > 3 else np.array([size])
    given = np.broadcast_to(given, lanes.shape)
    m.refuse(((given != 0) & (given != size)).any(), "a copy that is partly zeros")
    reading = given > 0
    m.memory.check(source[reading], size, m.text)
    value = np.zeros((len(lanes), size), np.uint8)
    value[reading] = m.memory.view(1)[(source[reading] - FIRST)[:, None] + np.arange(size)]
    index = m.shared.locate(m.block[lanes], to, size, m.text)
    at = m.watch.granules(index, size)
    m.watch.write(at, lanes, m.text)
    m.watch.arriving[at] = True
    m.copies.append(_Copies(lanes, index, value, m.committed[lanes]))


@instruction(r"cp\.async\.commit_group")
def commit(m, i, lanes):
    m.committed[lanes] += 1


@instruction(r"cp\.async\.wait_group")
def wait_for_groups(m, i, lanes):
    """Until at most so many groups of each lane, the latest, are under way."""
    limit = np.full(m.size, -1)
    limit[lanes] = m.committed[lanes] - i.operands[0].value
    left = []
    for c in m.copies:
        there = c.group < limit[c.lanes]
        at = m.watch.granules(c.index[there], c.value.shape[1])
        m.shared.bytes[c.index[there][:, None] + np.arange(c.value.shape[1])] = c.value[there]
        m.watch.arriving[at] = False
        m.watch.write(at, c.lanes[there], m.text)  # by the lane, at the time of its wait
        if not there.all():
            left.append(_Copies(c.lanes[~there], c.index[~there], c.value[~there], c.group[~there]))
    m.copies = left


# mbarriers ------------------------------------------------------------------------------------------------------------


@dataclass
class MBarrier:
    """A phase is over when all have arrived and all bytes have come."""

    number: int
    threads: int
    missing: int = 0  # arrivals
    bytes: int = 0
    phase: int = 0  # how many are over
    copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)  # index, bytes, granules

    def settle(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.threads


def _places(m: Machine, operand: Operand, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(byte index of each lane's mbarrier, its granules)"""
    index = m.shared.locate(m.block[lanes], addresses(m, operand, lanes), 8, m.text)
    return index, m.watch.granules(index, 8)


def _barriers(m: Machine, operand: Operand, lanes: np.ndarray) -> list[MBarrier]:
    index, at = _places(m, operand, lanes)
    m.watch.read(at, lanes, m.text)
    lost = [int(k) for k in index if int(k) not in m.barriers]
    m.refuse(bool(lost), f"there is no mbarrier at {lost[:1]}")
    return [m.barriers[int(k)] for k in index]


@instruction(r"mbarrier\.init\.shared::cta\.b64")
def initialise(m, i, lanes):
    index, at = _places(m, i.operands[0], lanes)
    m.watch.write(at, lanes, m.text)
    threads = i.operands[1].value
    for k in index:
        m.refuse(int(k) in m.barriers, "an mbarrier is there already")
        m.barriers[int(k)] = MBarrier(len(m.watch.seen), threads, threads)
        m.watch.seen = np.vstack([m.watch.seen, np.zeros((1, m.size), np.int32)])


@instruction(r"mbarrier\.inval\.shared::cta\.b64")
def invalidate(m, i, lanes):
    index, at = _places(m, i.operands[0], lanes)
    m.watch.write(at, lanes, m.text)
    for k in index:
        m.refuse(int(k) not in m.barriers, "there is no mbarrier")
        m.refuse(bool(m.barriers.pop(int(k)).copies), "a copy has not come yet")


@instruction(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64")
def expect(m, i, lanes):
    m.refuse(i.operands[0] is not None, "a state is asked for")
    size = np.broadcast_to(m.read(i.operands[2], np.uint32, lanes), lanes.shape)
    for barrier, n in zip(_barriers(m, i.operands[1], lanes), size, strict=True):
        m.refuse(barrier.missing == 0, "more arrivals than the mbarrier counts")
        barrier.missing -= 1
        barrier.bytes += int(n)
        barrier.settle()
    m.events += 1


@instruction(r"mbarrier\.try_wait\.parity\.shared::cta\.b64")
def try_wait(m, i, lanes):
    """Waits until the phase of that parity is over. Copies come now, if they were not waited for before."""
    parity = np.broadcast_to(m.read(i.operands[2], np.uint32, lanes), lanes.shape) & 1
    barriers = _barriers(m, i.operands[1], lanes)
    for barrier in {id(b): b for b, p in zip(barriers, parity, strict=True) if b.phase & 1 == p}.values():
        _deliver(m, barrier)
    phases, numbers = np.array([(b.phase, b.number) for b in barriers]).T
    over = (phases & 1) != parity
    m.watch.seen[numbers[over], lanes[over]] = phases[over]
    m.write(i.operands[0], np.ones(len(lanes), bool), lanes)
    m.wait(lanes[~over], AT_COPY, again=True)


def release(m: Machine) -> bool:
    """Lets go who waits for a copy, if any has been issued since they looked."""
    waiting = m.all[m.state == AT_COPY]
    if len(waiting) == 0 or m.events == m.looked:
        return False
    m.looked = m.events
    m.go(waiting)
    return True


def _deliver(m: Machine, barrier: MBarrier) -> None:
    for index, value, at in barrier.copies:
        m.shared.bytes[index] = value
        m.watch.arrive(at, barrier.number, barrier.phase)
        barrier.bytes -= len(value)
    if barrier.copies:
        barrier.copies = []
        barrier.settle()


@instruction(r"fence\.proxy\.async\.shared::cta")
def fence(m, i, lanes):
    """What the asynchronous proxy sees is not told apart here."""


# The tensor memory accelerator ----------------------------------------------------------------------------------------


@instruction(r"cp\.async\.bulk\.tensor\.[24]d\.shared::cta\.global\.mbarrier::complete_tx::bytes")
def copy_box(m, i, lanes):
    """[to], [map, {coordinates, innermost first}], [mbarrier]: a box, with zeros where it leaves the tensor."""
    to = addresses(m, i.operands[0], lanes)
    maps = m.read(i.operands[1].base, np.uint64, lanes).astype(np.int64) - PARAMETERS
    maps = np.broadcast_to(maps, lanes.shape)
    corner = [np.broadcast_to(m.read(o, np.int32, lanes), lanes.shape) for o in i.operands[1].coordinates]
    for k, barrier in enumerate(_barriers(m, i.operands[2], lanes)):
        m.refuse(int(maps[k]) not in m.grid.maps, "no tensor map")
        tensor = m.grid.maps[int(maps[k])]
        m.refuse(len(corner) != len(tensor.shape), f"{len(corner)} coordinates of {len(tensor.shape)}")
        value = _box(m, tensor, [int(c[k]) for c in reversed(corner)])
        _issue(m, tensor, int(to[k]), value, lanes[k : k + 1], barrier)
    m.events += 1


def _box(m: Machine, tensor: TensorMap, first: list[int]) -> np.ndarray:
    """Its bytes, uint8 [rows, bytes of a row]."""
    size = int(np.prod(tensor.shape)) * tensor.width
    for end in (tensor.address, tensor.address + size - 1):
        m.memory.check(np.array([end]), 1, m.text)
    *outer, inner = tensor.shape
    whole = m.memory.bytes(tensor.address, size).reshape(*outer, inner, tensor.width)
    box = np.zeros((*tensor.box, tensor.width), np.uint8)
    low = [max(0, f) for f in first]
    high = [max(a, min(f + b, s)) for a, f, b, s in zip(low, first, tensor.box, tensor.shape, strict=True)]
    inside = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, first, strict=True))
    if all(b > a for a, b in zip(low, high, strict=True)):
        box[inside] = whole[tuple(map(slice, low, high))]
    return box.reshape(-1, tensor.box[-1] * tensor.width)


def _issue(m: Machine, tensor: TensorMap, to: int, value: np.ndarray, lane: np.ndarray, barrier: MBarrier) -> None:
    alignment = 8 * ROW[tensor.swizzle] if tensor.swizzle else 128
    m.refuse(to % alignment != 0, f"a destination that is not a multiple of {alignment}")
    m.refuse(to + value.size > m.shared.size or to < 0, "a destination out of bounds")
    if tensor.swizzle and value.shape[1] != ROW[tensor.swizzle]:
        raise Fault(f"{m.text}: a row of {value.shape[1]} bytes for a swizzle of {ROW[tensor.swizzle]}")
    index = m.block[lane[0]] * m.shared.stride + swizzled(to + np.arange(value.size), tensor.swizzle)
    at = np.unique(index // m.watch.granule)[None]
    m.watch.check_write(at, lane, m.text)
    m.watch.arriving[at] = True
    barrier.copies.append((index, value.reshape(-1), at[0]))
