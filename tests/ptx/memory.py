"""What addresses mean: the host's memory as global memory, of which a launch may touch its tensors; shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from tests.ptx.program import BITS, Fault

FIRST = 1 << 16  # no object lies below
SHARED = 1 << 60  # generic addresses of shared memory: + block · WINDOW + offset
WINDOW = 1 << 24
PARAMETERS = 1 << 61  # generic addresses of parameters: + offset

_host = np.frombuffer((ctypes.c_uint8 * ((1 << 47) - FIRST)).from_address(FIRST), np.uint8)


class GlobalMemory:
    """The process's own memory, at its own addresses, within the extents (address, bytes) that are known."""

    def __init__(self, extents: Iterable[tuple[int, int]]):
        merged: list[list[int]] = []
        for start, size in sorted(e for e in extents if e[1]):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self.starts = np.array([0, *(start for start, _ in merged)], np.int64)
        self.ends = np.array([0, *(end for _, end in merged)], np.int64)

    def check(self, address: np.ndarray, size: int, what: str) -> None:
        """address: int64, of accesses of ``size`` bytes each."""
        if (address % size).any():
            raise Fault(f"{what}: global address not a multiple of {size}")
        at = np.searchsorted(self.starts, address, side="right") - 1
        outside = address + size > self.ends[at]
        if outside.any():
            raise Fault(f"{what}: {outside.sum()} global accesses out of bounds, the first at {address[outside][0]:#x}")

    def view(self, width: int) -> np.ndarray:
        """All of it as unsigned integers of ``width`` bytes; index (address − FIRST)/width."""
        return _host.view(BITS[width])

    def bytes(self, address: int, size: int) -> np.ndarray:
        return _host[address - FIRST : address - FIRST + size]


class SharedMemory:
    """bytes [blocks, size] of every block that runs side by side."""

    def __init__(self, blocks: int, size: int):
        self.size = size
        self.stride = -(-max(size, 1) // 128) * 128
        self.bytes = np.zeros(blocks * self.stride, np.uint8)

    def locate(self, block: np.ndarray, offset: np.ndarray, size: int, what: str) -> np.ndarray:
        """Index into ``bytes`` of accesses of ``size`` bytes, checked."""
        if (offset % size).any():
            raise Fault(f"{what}: shared address not a multiple of {size}")
        if ((offset < 0) | (offset + size > self.size)).any():
            raise Fault(f"{what}: shared access at {offset.max()} out of bounds: the block has {self.size} bytes")
        return block * self.stride + offset
