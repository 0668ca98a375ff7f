"""Threads with threads: exchange within a warp, barriers of a warp, a block and a cluster, and the end."""

from __future__ import annotations

import numpy as np

from tests.ptx.arithmetic import inputs
from tests.ptx.machine import AT_BARRIER, AT_CLUSTER, DONE, Machine, instruction
from tests.ptx.program import Fault, Immediate, Pair

REDUCE = {"max": np.max, "min": np.min, "add": np.sum}


def whole_warps(m: Machine, lanes: np.ndarray, size: int = 32) -> np.ndarray:
    """lanes → [warps, 32]; a fault unless they are whole (128: warpgroups)."""
    if len(lanes) % size == 0:
        rows = lanes.reshape(-1, size)
        if (rows[:, 0] % size == 0).all() and (rows[:, -1] - rows[:, 0] == size - 1).all():
            return rows
    raise Fault(f"{m.text}: only part of the {size} threads are here")


@instruction(r"shfl\.sync\.(bfly|idx)\.b32")
def shuffle(m, i, lanes):
    """From lane ^ mask, or from the lane named, of the whole warp."""
    warps = whole_warps(m, lanes)
    to, value, which, clamp, members = i.operands
    m.refuse((m.read(clamp, np.uint32, lanes) != 31).any(), "a clamp other than 31")
    m.refuse((m.read(members, np.uint32, lanes) != 0xFFFFFFFF).any(), "not all of the warp are members")
    given = np.broadcast_to(m.read(value, np.uint32, lanes), lanes.shape).reshape(warps.shape)
    which = np.broadcast_to(m.read(which, np.uint32, lanes), lanes.shape).astype(np.int64).reshape(warps.shape)
    source = (np.arange(32) ^ which if "bfly" in i.parts else which) % 32
    m.write(to.first if isinstance(to, Pair) else to, np.take_along_axis(given, source, 1).reshape(-1), lanes)
    if isinstance(to, Pair):
        m.write(to.second, np.ones(len(lanes), bool), lanes)


@instruction(r"redux\.sync\.(max|min|add)\.s32")
def reduce(m, i, lanes):
    warps = whole_warps(m, lanes)
    m.refuse((m.read(i.operands[2], np.uint32, lanes) != 0xFFFFFFFF).any(), "not all of the warp are members")
    given = np.broadcast_to(inputs(m, i, lanes, 1)[0], lanes.shape).reshape(warps.shape)
    total = REDUCE[i.parts[2]](given, 1, keepdims=True).astype(np.int32)
    m.write(i.operands[0], np.broadcast_to(total, warps.shape).reshape(-1), lanes)


@instruction(r"elect\.sync")
def elect(m, i, lanes):
    """One thread of each warp: here its first."""
    whole_warps(m, lanes)
    m.write(i.operands[0].first, np.zeros(len(lanes), np.uint32), lanes)
    m.write(i.operands[0].second, lanes % 32 == 0, lanes)


@instruction(r"bar\.warp\.sync")
def warp_barrier(m, i, lanes):
    whole_warps(m, lanes)
    m.clock.warp[lanes] += 1


@instruction(r"bar\.sync")
def block_barrier(m, i, lanes):
    m.refuse(i.operands != (Immediate(0),), "a barrier other than the block's 0")
    m.wait(lanes, AT_BARRIER)


@instruction(r"barrier\.cluster\.arrive")
def cluster_arrive(m, i, lanes):
    m.clock.arrived[lanes] += 1


@instruction(r"barrier\.cluster\.wait")
def cluster_wait(m, i, lanes):
    m.refuse((m.clock.arrived[lanes] <= m.clock.waited[lanes]).any(), "a wait without an arrival before it")
    m.wait(lanes, AT_CLUSTER)


@instruction(r"ret", r"exit")
def end(m, i, lanes):
    m.finish(lanes)


def release(m: Machine) -> bool:
    """Lets go the blocks and the clusters of which every thread that there is has come to its barrier."""
    going = []
    for lanes in m.all.reshape(-1, m.grid.threads):
        waiting = m.state[lanes] == AT_BARRIER
        if waiting.any() and (waiting | (m.state[lanes] == DONE)).all():
            if not waiting.all():
                raise Fault(f"{(~waiting).sum()} threads of a block ended before a barrier of the others")
            m.clock.barriers[m.block[lanes[0]]] += 1
            m.watch.seen[:, lanes] = m.watch.seen[:, lanes].max(1, keepdims=True)
            going.append(lanes)
    for lanes in m.all.reshape(-1, m.grid.threads * m.grid.cluster):
        waiting = lanes[m.state[lanes] == AT_CLUSTER]
        free = waiting[m.clock.waited[waiting] < m.clock.arrived[lanes].min()]
        m.clock.waited[free] += 1
        going.append(free)
    if sum(map(len, going)) == 0:
        return False
    m.go(np.sort(np.concatenate(going)))
    return True
