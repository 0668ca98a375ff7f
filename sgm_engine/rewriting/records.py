"""Records of the things that decide what a module computes: a mapping's entries, classes, what a tensor holds.

Each has ``same()``, quick and by identity; ``changed(ignored)``, the name of what is another, if it is not an equal
number assigned again; and ``differing()``, the (holder, key) of everything that is another.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from operator import is_not
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.overrides import _len_torch_function_stack

LONG = 4096  # elements of a tensor, and entries of a container, that are looked at one by one
MISSING = object()
LEAVES = (bool, int, float, complex, str, bytes, type(None), enum.Enum, range, slice, torch.dtype, torch.device)
LEAVES += (torch.Size, torch.layout, torch.memory_format, np.generic, np.dtype, type(...))


class Entries:
    """The keys and values of a mapping; of ``names`` alone if they are given."""

    def __init__(self, holder: Mapping, path: str, names: tuple[str, ...] | None = None):
        self.holder, self.path, self.names = holder, path, names
        self.keys, self.values = self._now()

    def _now(self) -> tuple[tuple, tuple]:
        if self.names is not None:
            return self.names, tuple(self.holder.get(name, MISSING) for name in self.names)
        return tuple(self.holder), tuple(self.holder.values())

    def same(self) -> bool:
        holder = self.holder
        if self.names is not None:
            return not any(map(is_not, self._now()[1], self.values))
        same = len(holder) == len(self.keys) and not any(map(is_not, holder.values(), self.values))
        return same and not any(map(is_not, holder, self.keys))

    def changed(self, ignored: set) -> str | None:
        keys, values = self._now()
        before, now = dict(zip(self.keys, self.values, strict=False)), dict(zip(keys, values, strict=False))
        for key in [*before, *(k for k in now if k not in before)]:
            if (id(self.holder), key) not in ignored and not _equal(before.get(key, MISSING), now.get(key, MISSING)):
                return f"{self.path}.{key}" if isinstance(key, str) else f"{self.path}[{key!r}]"
        if not any((id(self.holder), key) in ignored for key in {*before, *now}):
            self.keys, self.values = keys, values  # an equal number, assigned again
        return None

    def differing(self) -> Iterator[tuple]:
        before = dict(zip(self.keys, self.values, strict=True))
        for key, value in zip(*self._now(), strict=True):
            if not _equal(before.get(key, MISSING), value):
                yield id(self.holder), key


class Empty:
    """Containers that hold nothing, most of them PyTorch's own for hooks."""

    def __init__(self) -> None:
        self.holders, self.paths, self.path = [], [], "hooks"

    def same(self) -> bool:
        return not any(self.holders)

    def changed(self, ignored: set) -> str | None:
        filled = (i for i, h in enumerate(self.holders) if any(what not in ignored for what in self._of(h)))
        return next((self.paths[i] for i in filled), None)

    def differing(self) -> Iterator[tuple]:
        return (what for holder in self.holders for what in self._of(holder))

    @staticmethod
    def _of(holder) -> list[tuple]:
        keyed = isinstance(holder, Mapping)
        return [(id(holder), key) for key in holder] if keyed else [(id(holder), None)] * bool(holder)


class Kinds:
    """The classes of the modules and config objects, which may be assigned to."""

    def __init__(self) -> None:
        self.objects, self.kinds, self.paths, self.path = [], [], [], "a class"

    def same(self) -> bool:
        return not any(map(is_not, map(type, self.objects), self.kinds))

    def changed(self, ignored: set) -> str | None:
        found = (i for i, what in enumerate(self.objects) if type(what) is not self.kinds[i])
        return next((f"{self.paths[i]}.__class__" for i in found), None)

    def differing(self) -> Iterator[tuple]:
        return iter(())


class State:
    """What ``read()`` returns, compared as a tuple: by identity of its items, else by value."""

    def __init__(self, read: Callable[[], tuple], path: str, holder: object):
        self.read, self.path, self.holder, self.values = read, path, holder, read()

    def same(self) -> bool:
        values = self.read()
        return len(values) == len(self.values) and not any(map(is_not, values, self.values))

    def changed(self, ignored: set) -> str | None:
        return None if (id(self.holder), None) in ignored or _equal(self.values, self.read()) else self.path

    def differing(self) -> Iterator[tuple]:
        if not _equal(self.values, self.read()):
            yield id(self.holder), None


def slots(what: object, names: tuple[str, ...]) -> tuple:
    def read(name: str) -> object:
        try:
            return getattr(what, name)
        except (AttributeError, ValueError):  # ValueError: an empty cell
            return MISSING

    return tuple(map(read, names))


def everywhere() -> tuple:
    """Settings of PyTorch that decide what a network computes on a CPU."""
    return torch.get_default_dtype(), _len_torch_function_stack(), torch.are_deterministic_algorithms_enabled()


def tensor(t: Tensor) -> tuple:
    """Where it is and what it holds: NumPy and ``.data`` write without a new version."""
    try:
        version = 0 if t.is_inference() else t._version
        held = _digest(t.detach()) if t.device.type == "cpu" and t.layout is torch.strided else 0
        return t.data_ptr(), version, t.shape, t.dtype, t.device, held
    except (RuntimeError, TypeError, NotImplementedError):  # fake, quantised, sharded
        return (id(t),)


def _digest(t: Tensor) -> int:
    flat = t.reshape(-1)
    flat = flat[:: max(1, flat.numel() // LONG)].contiguous()
    return crc32(flat.view(torch.uint8).numpy()) if flat.numel() else 0


def array(a: np.ndarray) -> tuple:
    flat = a.reshape(-1)[:: max(1, a.size // LONG)]
    held = repr(flat.tolist()) if a.dtype.hasobject else crc32(np.ascontiguousarray(flat).view(np.uint8))
    return a.shape, a.dtype, held


def _equal(a: object, b: object) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, LEAVES) and repr(a) == repr(b)
