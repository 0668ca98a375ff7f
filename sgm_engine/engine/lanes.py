"""The compute batches of an engine: one of ``batch`` slots, and smaller ones (buckets) for smaller requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sgm_engine.checks import check_int
from sgm_engine.executors.network import Network
from sgm_engine.executors.protocol import Executor
from sgm_engine.executors.slots import Slots, Tables


class Lane(NamedTuple):
    """Slots, and the executor that is bound to them."""

    slots: Slots
    executor: Executor


class Lanes:
    """Lanes by size, over one network and one set of tables; one runs at a time. A smaller one is made when first used.

    Which lane a request runs in depends on its size alone, so that its bits depend on nothing else either.
    """

    def __init__(self, sizes: Sequence[int], network: Network, tables: Tables, first: Slots, executor: Executor):
        """sizes: the smaller ones. first: the largest lane's slots, with its executor, bound by ``rebind``."""
        self.sizes = [*sizes, first.batch]
        self.network, self.tables = network, tables
        self.current = Lane(first, executor)
        self._made = {first.batch: self.current}

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def use(self, n: int | None) -> None:
        """Run the next request in the smallest lane that holds its n samples; else, and for None, in the largest."""
        size = self.largest if n is None else next((size for size in self.sizes if size >= n), self.largest)
        if size not in self._made:
            slots, executor = self.current.slots.of(size), self.current.executor.sibling()
            executor.bind(self.network, slots, self.tables)
            self._made[size] = Lane(slots, executor)
        self.current = self._made[size]

    def halve(self) -> None:
        """Half the current lane's slots from now on, which is the largest lane then; what was larger is freed."""
        size = self.current.slots.batch // 2
        last = self.current
        self._made = {s: lane for s, lane in self._made.items() if s < size}
        self.sizes = [s for s in self.sizes if s < size] + [size]
        executor = last.executor.sibling()
        slots = last.slots.of(size)
        del last
        self.current = Lane(slots, executor)
        self._made[size] = self.current
        executor.bind(self.network, slots, self.tables)

    def rebind(self) -> None:
        """The network is another, or holds other tensors."""
        for slots, executor in self._made.values():
            executor.bind(self.network, slots, self.tables)

    def replace(self, executor: Executor) -> None:
        """The current lane runs by this executor, and lanes to come by its siblings; the others are freed."""
        executor.bind(self.network, self.current.slots, self.tables)
        self.current = Lane(self.current.slots, executor)
        self._made = {self.current.slots.batch: self.current}


def check_buckets(buckets: Sequence[int], batch: int) -> list[int]:
    """Ascending, without repetition, each below ``batch``."""
    if isinstance(buckets, (str, int)) or not hasattr(buckets, "__iter__"):
        raise TypeError(f"buckets must be a list of batch sizes, got {buckets!r}")
    sizes = sorted({check_int("buckets", size, 1) for size in buckets})
    if sizes and sizes[-1] > batch:
        raise ValueError(f"buckets must be at most batch = {batch}, got {sizes[-1]}: raise batch")
    return [size for size in sizes if size < batch]


class Turns:
    """Requests of one engine, from threads that may use CUDA streams of their own, follow one another on the device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = torch.cuda.Event() if device.type == "cuda" else None

    def begin(self) -> None:
        """What the current stream does from here on waits for the request before; for the first there is nothing to."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def end(self) -> None:
        if self._last is not None:
            self._last.record(torch.cuda.current_stream(self._device))
