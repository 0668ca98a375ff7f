"""What decides what a module computes, beside the values of its weights: recorded once, compared in microseconds.

A copy, a trace or a captured graph of a module is worth something only while what it was made from is as it was.
``Observed(module)`` records everything reachable from there: attributes, containers, config objects, classes, closures,
globals that its code names, hooks, modes, plain tensors. ``changed()`` compares by identity, and by value where a
number was assigned again. Objects that only C knows, locks and trainers are recorded by identity alone.
"""

from __future__ import annotations

import copy
import sys
import types
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks_of_all

from sgm_engine.rewriting.records import (
    LEAVES,
    LONG,
    MISSING,
    Empty,
    Entries,
    Kinds,
    State,
    array,
    everywhere,
    slots,
    tensor,
)

MOST = 20_000  # records; what lies beyond them is left to whoever compares the results
# Their code is taken as it is; a name in it that is replaced is seen, one that it reads is not followed.
TRUSTED = {"torch", "numpy", "sgm_engine", *sys.stdlib_module_names} - {"__main__"}
# Their objects change all the time, and say nothing about a network.
OPAQUE = {"lightning", "lightning_fabric", "pytorch_lightning", "accelerate", "torch", *sys.stdlib_module_names}
OPAQUE -= {"types", "argparse", "collections", "functools", "__main__", "dataclasses"}
OWNERS = (Tensor, list, tuple, dict, set, frozenset, deque)  # which may have attributes beside what they hold
OWN_OPAQUE = ("sgm_engine.engine", "sgm_engine.executors", "sgm_engine.service", "sgm_engine.rewriting")


class Observed:
    """module: what is observed, from now on. Entries that its forward writes itself are left out by ``settle``."""

    def __init__(self, module: object, ignored: set | None = None):
        self.module, self.ignored = module, ignored or set()
        walk = _Walk(self.ignored)
        walk.follow(module, type(module).__name__)
        self.records, self._alive = walk.records, walk.seen

    def changed(self) -> str | None:
        """The name of something that is another than it was, or None."""
        for record in self.records:
            try:
                if not record.same() and (path := record.changed(self.ignored)) is not None:
                    return path
            except RuntimeError:  # it changes while another thread looks at it
                return record.path
        return None

    def __deepcopy__(self, memo: dict) -> Observed:
        return Observed(copy.deepcopy(self.module, memo))

    def settle(self) -> Observed:
        """Asked after a call of the module: without the counters and caches that the call itself has written."""
        written = {what for record in self.records if not record.same() for what in record.differing()}
        return Observed(self.module, self.ignored | written) if written else self


class _Walk:
    def __init__(self, ignored: set):
        self.ignored = ignored
        self.records: list = [State(everywhere, "the setting of PyTorch", self)]
        for hooks in (hooks_of_all._global_forward_hooks, hooks_of_all._global_forward_pre_hooks):
            self.records.append(Entries(hooks, "global hooks"))
        self.records.append(Entries(vars(F), "torch.nn.functional"))
        self.empty, self.kinds = Empty(), Kinds()
        self.records += [self.empty, self.kinds]
        self.seen: dict[object, object] = {}
        self.weights: set[int] = set()
        self.todo: deque[tuple[object, str]] = deque()

    def follow(self, start: object, path: str) -> None:
        self.todo.append((start, path))
        while self.todo and len(self.records) < MOST:
            what, path = self.todo.popleft()
            if not isinstance(what, LEAVES) and id(what) not in self.seen:
                self.seen[id(what)] = what
                self._record(what, path)

    def _record(self, what: object, path: str) -> None:
        if isinstance(what, OWNERS) and (own := getattr(what, "__dict__", None)):
            self._entries(own, path)
        if isinstance(what, nn.Module):
            self._module(what, path)
        elif isinstance(what, Tensor):
            if id(what) not in self.weights:
                self.records.append(State(partial(tensor, what), path, what))
        elif isinstance(what, np.ndarray):
            self.records.append(State(partial(array, what), path, what))
        elif isinstance(what, types.FunctionType):
            self._function(what, path)
        elif isinstance(what, type):
            self._class(what, path)
        elif isinstance(what, (types.MethodType, classmethod, staticmethod, property, partial)):
            names = ("__func__", "__self__", "fget", "func", "args", "keywords")
            self.todo.extend((getattr(what, name), path) for name in names if getattr(what, name, None) is not None)
        elif isinstance(what, (list, tuple, deque, set, frozenset)):
            self._items(what, path)
        elif isinstance(what, (dict, types.MappingProxyType)):
            self._entries(what, path)
            if isinstance(what, defaultdict):
                self.records.append(State(lambda: (what.default_factory,), f"{path}.default_factory", what))
                self.todo.append((what.default_factory, f"{path}.default_factory"))
        elif not isinstance(what, (types.ModuleType, types.BuiltinFunctionType)):
            self._object(what, path)

    def _module(self, module: nn.Module, path: str) -> None:
        if (only := getattr(type(module), "__observed__", None)) is not None:  # an Accelerated
            return self.todo.append((only(module), path))
        own = vars(module)
        for weights in ("_parameters", "_buffers"):  # which tensors they are; what they hold is for others to watch
            self.records.append(Entries(own[weights], path)) if own[weights] else self._nothing(own[weights], path)
            self.seen[id(own[weights])] = own[weights]
            self.weights.update(map(id, own[weights].values()))
        for name, child in own["_modules"].items():
            self.todo.appendleft((child, f"{path}.{name}"))
        self._entries(own, path)
        self._kind(module, path)
        return None

    def _entries(self, holder: Mapping, path: str) -> None:
        if len(holder) > LONG:
            return self.records.append(State(lambda: (len(holder),), path, holder))
        if not holder:
            return self._nothing(holder, path)
        self.records.append(record := Entries(holder, path))
        for key, value in zip(record.keys, record.values, strict=True):
            if (id(holder), key) not in self.ignored:
                self.todo.append((value, f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]"))
        return None

    def _nothing(self, holder, path: str) -> None:
        self.empty.holders.append(holder)
        self.empty.paths.append(path)

    def _items(self, holder, path: str) -> None:
        if len(holder) > LONG:
            return self.records.append(State(lambda: (len(holder),), path, holder))
        if not holder and not isinstance(holder, (tuple, frozenset)):
            return self._nothing(holder, path)
        if not isinstance(holder, (tuple, frozenset)):
            order = frozenset if isinstance(holder, set) else tuple
            self.records.append(State(lambda: tuple(order(holder)), path, holder))
        self.todo.extend((item, f"{path}[{i}]") for i, item in enumerate(holder))
        return None

    def _object(self, what: object, path: str) -> None:
        """A config object and its like."""
        kind = type(what)
        if kind.__module__.partition(".")[0] in OPAQUE or kind.__module__.startswith(OWN_OPAQUE):
            return
        if isinstance(getattr(what, "__dict__", None), dict):
            self._entries(what.__dict__, path)
        given = [vars(c).get("__slots__", ()) for c in kind.__mro__]
        names = tuple(n for some in given for n in ([some] if isinstance(some, str) else some) if n != "__dict__")
        if names:
            read = partial(slots, what, names)
            self.records.append(State(read, path, what))
            self.todo.extend((value, f"{path}.{name}") for name, value in zip(names, read(), strict=True))
        self._kind(what, path)

    def _kind(self, what: object, path: str) -> None:
        for column, value in ((self.kinds.objects, what), (self.kinds.kinds, type(what)), (self.kinds.paths, path)):
            column.append(value)
        self.todo.append((type(what), type(what).__qualname__))

    def _class(self, kind: type, path: str) -> None:
        """Its attributes and methods, and those of its bases."""
        for base in kind.__mro__[:-1]:
            top = base.__module__.partition(".")[0]
            if base is not kind:
                self.todo.append((base, base.__qualname__))
            elif top not in ("builtins", *sys.stdlib_module_names) and top not in TRUSTED:
                self._entries(vars(kind), path)
            elif top in ("torch", "sgm_engine"):
                self.records.append(Entries(vars(kind), path))

    def _function(self, function: types.FunctionType, path: str) -> None:
        names = ("__code__", "__defaults__", "__kwdefaults__", "__closure__")
        self.records.append(State(partial(slots, function, names), path, function))
        self.todo.extend((value, path) for value in (function.__defaults__, function.__kwdefaults__, vars(function)))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.records.append(State(partial(slots, cell, ("cell_contents",)), f"{path}: {name}", cell))
            self.todo.append((*slots(cell, ("cell_contents",)), f"{path}: {name}"))
        if (function.__module__ or "").partition(".")[0] not in TRUSTED:
            self._names(function.__globals__, tuple(dict.fromkeys(_names(function.__code__))), path)

    def _names(self, holder: dict, names: tuple[str, ...], path: str) -> None:
        """What code that uses ``names`` reads there, and in the Python modules that it reads there."""
        if (id(holder), names) in self.seen:
            return
        self.seen[id(holder), names] = holder
        self.records.append(record := Entries(holder, holder.get("__name__", path), names))
        for name, value in zip(names, record.values, strict=True):
            if isinstance(value, types.ModuleType):
                self._names(vars(value), names, f"{path}: {name}")
            elif value is not MISSING and holder.get("__name__", "").partition(".")[0] not in TRUSTED:
                self.todo.append((value, f"{path}: {name}"))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)
