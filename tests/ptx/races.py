"""Who touched which part of shared memory last, and whether a barrier lies between.

Two accesses of different threads, one of them a write, are ordered by a barrier of their block, by a barrier of their
cluster (arrive after the one, wait before the other), by a barrier of their warp, or, where an asynchronous copy
writes, by having seen its mbarrier complete. All else is a race, but for threads that write the value that is there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.program import Fault

NOBODY = np.int32(2**30)


class Clock:
    """What each lane has passed. A lane is a thread of any of the blocks that run side by side."""

    def __init__(self, lanes: int, block: np.ndarray):
        self.block = block  # of each lane
        self.barriers = np.zeros(int(block[-1]) + 1, np.int32)  # of each block
        self.arrived, self.waited, self.warp = (np.zeros(lanes, np.int32) for _ in range(3))  # of cluster and warp


class _Last:
    """The accesses of one kind since the last that everyone is ordered after: lowest and highest lane, and when."""

    def __init__(self, granules: int):
        self.low, self.high = np.full(granules, NOBODY, np.int32), np.full(granules, -1, np.int32)
        self.barriers, self.arrived, self.warp = (np.zeros(granules, np.int32) for _ in range(3))

    def unordered(self, at: np.ndarray, lane: np.ndarray, clock: Clock) -> np.ndarray:
        """Whether an access of another lane to ``at`` [n, k] may still be under way for ``lane`` [n, 1]."""
        low, high = self.low[at], self.high[at]
        other = (high >= 0) & ((low != lane) | (high != lane))
        if not other.any():
            return other
        low = np.where(other, low, lane)
        high = np.where(other, high, lane)
        block = clock.block
        together = (block[low] == block[lane]) & (block[high] == block[lane])
        ordered = together & (self.barriers[at] < clock.barriers[block[lane]])
        ordered |= self.arrived[at] < clock.waited[lane]
        ordered |= (low // 32 == lane // 32) & (high // 32 == lane // 32) & (self.warp[at] < clock.warp[lane])
        return other & ~ordered

    def add(self, at: np.ndarray, lane: np.ndarray, keep: np.ndarray, clock: Clock) -> None:
        """keep [n, k]: where earlier ones still count."""
        old = at[~keep]
        self.low[old], self.high[old] = NOBODY, -1
        lane = np.broadcast_to(lane, at.shape)
        np.minimum.at(self.low, at, lane)
        np.maximum.at(self.high, at, lane)
        self.barriers[at] = clock.barriers[clock.block[lane]]
        self.arrived[at] = clock.arrived[lane]
        self.warp[at] = clock.warp[lane]


class Watch:
    """Over shared memory of ``size`` bytes in all, in granules of the narrowest access that the program makes."""

    def __init__(self, size: int, granule: int, clock: Clock):
        self.granule, self.clock = granule, clock
        n = size // granule
        self.reads, self.writes = _Last(n), _Last(n)
        self.written = np.zeros(n, bool)
        self.arriving = np.zeros(n, bool)  # of an asynchronous copy that nobody has waited for yet
        self.used = np.zeros(n, np.int32)  # by matrix products that are under way
        self.copied_by = np.full(n, -1, np.int32)  # mbarrier, and…
        self.copied_in = np.zeros(n, np.int32)  # …the phase of it that says that the copy is there
        self.seen = np.zeros((0, len(clock.block)), np.int32)  # phases of each mbarrier that a lane has seen complete

    def granules(self, at: np.ndarray, size: int) -> np.ndarray:
        """Byte indices [n] of accesses of ``size`` bytes → granules [n, k]."""
        return (at // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def read(self, at: np.ndarray, lane: np.ndarray, what: str) -> None:
        """at: granules [n, k]; lane: [n]."""
        lane = lane[:, None]
        if self.arriving[at].any():
            raise Fault(f"{what}: reads what an asynchronous copy has not brought yet")
        if not self.written[at].all():
            raise Fault(f"{what}: shared memory is read before it is written")
        self._check_copied(at, lane, what)
        self._refuse(self.writes.unordered(at, lane, self.clock), at, lane, self.writes, f"{what}: read after write")
        self.reads.add(at, lane, self.reads.unordered(at, lane, self.clock), self.clock)

    def write(self, at: np.ndarray, lane: np.ndarray, what: str, same: Callable[[], np.ndarray] | None = None) -> None:
        """same() [n, k]: where the value is there already."""
        self.check_write(at, lane, what, same)
        lane = lane[:, None]
        self.writes.add(at, lane, self.writes.unordered(at, lane, self.clock), self.clock)
        self.written[at] = True
        self.copied_by[at] = -1

    def arrive(self, at: np.ndarray, barrier: int, phase: int) -> None:
        """A copy is there for whoever sees the phase of its mbarrier complete."""
        self.arriving[at], self.written[at] = False, True
        self.writes.high[at] = -1
        self.copied_by[at], self.copied_in[at] = barrier, phase

    def leave(self, at: np.ndarray, lane: int, what: str) -> None:
        """A block ends: nobody else may still read its memory ``at``."""
        lanes = np.array([[lane]])
        block = self.clock.block
        reads = self.reads.unordered(at[None], lanes, self.clock)[0]
        strange = (block[np.maximum(self.reads.high[at], 0)] != block[lane]) | (
            block[np.minimum(self.reads.low[at], len(block) - 1)] != block[lane]
        )
        if (reads & strange).any():
            raise Fault(f"{what}: a block ends while others of its cluster may still read its shared memory")

    def check_write(
        self, at: np.ndarray, lane: np.ndarray, what: str, same: Callable[[], np.ndarray] | None = None
    ) -> None:
        lane = lane[:, None]
        if self.used[at].any():
            raise Fault(f"{what}: overwrites what a matrix product still reads")
        if self.arriving[at].any():
            raise Fault(f"{what}: overwrites what an asynchronous copy is writing")
        self._check_copied(at, lane, what)
        self._refuse(self.reads.unordered(at, lane, self.clock), at, lane, self.reads, f"{what}: write after read")
        again = self.writes.unordered(at, lane, self.clock)
        if same is not None and again.any():
            again &= ~same()
        self._refuse(again, at, lane, self.writes, f"{what}: write after write")

    def _check_copied(self, at: np.ndarray, lane: np.ndarray, what: str) -> None:
        by = self.copied_by[at]
        if (by >= 0).any() and ((by >= 0) & (self.seen[by, lane] <= self.copied_in[at])).any():
            raise Fault(f"{what}: touches a copy whose mbarrier the thread has not waited for")

    def _refuse(self, bad: np.ndarray, at: np.ndarray, lane: np.ndarray, last: _Last, what: str) -> None:
        if bad.any():
            first = tuple(index[0] for index in np.nonzero(bad))
            who, cell = int(lane[first[0], 0]), at[first]
            others = f"{int(last.low[cell])}–{int(last.high[cell])}"
            raise Fault(f"race, {what}, granule {int(cell)}: thread {who} and {others}; {bad.sum()} in all")
