"""Whatever is no parameter and no buffer of a model and decides its samples, each value by where it is found.

That is guidance, operators, measurements, flags, containers, closures, classes, code. So a refusal can say "the model's
weight was 1.5 and is now 7.5".
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.jobs.built import NOTES, OF_MODULES, as_built
from sgm_engine.jobs.digests import digest_of, digest_of_code, names_in
from sgm_engine.jobs.objects import (
    OWN,
    PLAIN,
    fields_of,
    has_more,
    is_cache,
    is_installed,
    is_plain,
    name_of,
    users_of,
)
from sgm_engine.rewriting.altered import MODAL, altered

BY_NAME = (types.ModuleType, types.BuiltinFunctionType, torch.memory_format, torch.layout, type(torch.add))
BY_NAME += (types.MemberDescriptorType, types.GetSetDescriptorType, types.MethodDescriptorType)
CONTAINERS = (list, tuple, set, frozenset)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
UNWRAPPED = ("__func__", "fget", "func", "__wrapped__")  # where methods, properties and caches keep their function


def settings(model: Callable) -> dict[str, str]:
    """{where: value} of all that decides the samples beside parameters and buffers.

    Of a network of this package, what its configuration does not say: nothing, unless somebody has changed it. Numbers
    and texts as they are, tensors and arrays as sha256, functions by their code, defaults, closures and the globals
    that they name. Raises ValueError, naming the argument ``weights``, for what cannot be told from another.
    """
    found = _Walk()
    found.visit("", model)
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if hooks := getattr(nn.modules.module, name):
            found.visit(f"hooks of all modules: {name}", list(hooks.values()))
    return found.said()


def own_config(module: object) -> object | None:
    """The configuration of a network of this package, which says how it is built; None of any other."""
    if type(module).__module__.partition(".")[0] != "sgm_engine":
        return None
    config = getattr(module, "config", None)
    return config if hasattr(config, "to_json") else None


def indistinct(path: str, value: object) -> ValueError:
    return ValueError(
        f"weights: {path or 'the model'} is a {type(value).__name__}, which cannot be told from another: pass "
        "weights='…', a name or digest that changes whenever the model does"
    )


class _Walk:
    def __init__(self, pristine: bool = False):
        """pristine: as if nobody had altered a class."""
        self._pristine = pristine
        self.entries: dict[str, str] = {}
        self.layers: dict[str, str] = {}  # of PyTorch's own layers, of which there are many
        self.library: dict[str, str] = {}  # what the code of installed libraries reads
        self._seen: dict[int, str] = {}
        self._alive: list[object] = []  # an id means something only while its object lives

    def said(self) -> dict[str, str]:
        for name, found in (("layers of torch.nn", self.layers), ("installed libraries", self.library)):
            if found:
                text = "\n".join(f"{where} {value}" for where, value in sorted(found.items()))
                self._say(name, hashlib.sha256(text.encode()).hexdigest())
        return dict(sorted(self.entries.items()))

    def visit(self, path: str, value: object) -> None:
        if isinstance(value, (Tensor, *PLAIN)) and not isinstance(value, enum.Enum):
            for name, item in getattr(value, "__dict__", {}).items():  # somebody's own, on a tensor or a number
                self.visit(_join(path, name), item)
        if isinstance(value, (enum.Enum, *PLAIN)):
            self._say(path, repr(value.item() if isinstance(value, np.generic) else value))
        elif isinstance(value, (Tensor, np.ndarray)):
            self._tensor(path, value)
        elif isinstance(value, BY_NAME):
            self._say(path, name_of(value))
        elif isinstance(value, (Path, range, slice)):
            self._say(path, repr(value))
        elif isinstance(value, logging.Logger):
            pass
        elif id(value) in self._seen:
            if self._seen[id(value)] != path:
                self._say(path, f"the same as {self._seen[id(value)] or 'the model'}")
        else:
            self._see(path, value)
            self._inside(path, value)

    def _inside(self, path: str, value: object) -> None:
        if isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, type):
            self._namespace(path, value)
        elif isinstance(value, (Mapping, *CONTAINERS)):
            self._items(path, value)
        elif isinstance(value, functools.partial):
            self.visit(path, value.func)
            self.visit(f"{path}.args", value.args)
            self.visit(f"{path}.keywords", value.keywords)
        elif isinstance(value, types.MethodType):
            self.visit(path, value.__self__)
            self.visit(f"{path}.{value.__name__}", value.__func__)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif hasattr(value, "__wrapped__") or not has_more(type(value)):
            self._code(path, type(value))
            for name, item in fields_of(value).items():
                if not is_cache(value, name):
                    self.visit(_join(path, name), item)
        else:
            raise indistinct(path, value)

    def _items(self, path: str, value: Mapping | list | tuple | set | frozenset) -> None:
        if isinstance(value, Mapping):
            for key in value:
                self.visit(f"{path}[{key!r}]", value[key])
        elif isinstance(value, (set, frozenset)):
            self._say(path, repr(sorted(map(repr, value))))
        elif all(isinstance(v, PLAIN) for v in value):
            self._say(path, repr(value))
        else:
            for i, item in enumerate(value):
                self.visit(f"{path}[{i}]", item)
        if isinstance(value, (dict, *CONTAINERS)):  # a user's subclass of these
            own = fields_of(value) | {"default_factory": getattr(value, "default_factory", None)}
            for name, item in own.items():
                if item is not None:
                    self.visit(_join(path, name), item)

    def _module(self, path: str, module: nn.Module) -> None:
        if path:  # in an attribute or a closure: its tensors are not among the model's
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                self._tensor(_join(path, name), tensor)
        self._part(path, module, alone=bool(path))

    def _part(self, path: str, part: nn.Module, alone: bool = False) -> None:
        self._see(path, part)
        if (only := getattr(type(part), "__observed__", None)) is not None:  # an Accelerated: its source
            return self._part(path, only(part), alone)
        if (config := own_config(part)) is None:
            return self._layer(path, part)
        if alone:
            self._say(_join(path, "config"), config.to_json())
        if as_built(part, config):
            return None
        here, built = _Walk(self._pristine), _Walk(pristine=True)
        here._seen, here._alive = dict(self._seen), self._alive
        here._layer(path, part)
        with torch.device("meta"):
            built._layer(path, config.build().train(part.training))
        said, usual = here.said(), built.said()
        self.entries |= {name: text for name, text in said.items() if usual.get(name) != text}
        return None

    def _layer(self, path: str, part: nn.Module) -> None:
        self._code(path, type(part))
        if not self._pristine and (what := altered(part)):
            self._say(_join(path, "altered"), what)
            for name in ("forward", "_conv_forward"):
                if isinstance(method := vars(type(part)).get(name), types.FunctionType):
                    self._function(_join(path, name), method)
        of_torch = type(part).__module__.startswith("torch.nn")
        outside, self.entries = self.entries, {} if of_torch else self.entries
        if isinstance(part, MODAL):
            self._say(_join(path, "training"), repr(part.training))
        own = type(part).__module__.split(".")[0] in OWN
        for name, value in vars(part).items():
            hidden = own and (name in NOTES or (name.startswith("_") and not (of_torch and is_plain(value))))
            if (name in HOOKS and value) or (name not in OF_MODULES and not hidden and not is_cache(part, name)):
                self.visit(_join(path, name), list(value.values()) if name in HOOKS else value)  # their keys count up
        if of_torch:
            self.layers |= self.entries
            self.entries = outside
        for name, child in part.named_children():
            self._part(_join(path, name), child)

    def _function(self, path: str, function: types.FunctionType) -> None:
        if function.__module__ and function.__module__.split(".")[0] in OWN:
            self._say(f"{path}()", name_of(function))
        else:
            self._say(f"{path}()", digest_of_code(function.__code__))
            self._globals(path, function)
        self._bound(path, function)
        for name, value in vars(function).items():
            self._of(function.__module__, _join(path, name), value)

    def _bound(self, path: str, function: types.FunctionType) -> None:
        """What a function keeps: its closure and its defaults."""
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # empty: not yet assigned
                continue
            if name != "__class__":
                self._of(function.__module__, _join(path, name), value)
        for i, value in enumerate(function.__defaults__ or ()):
            self._of(function.__module__, f"{path}.default[{i}]", value)
        for name, value in (function.__kwdefaults__ or {}).items():
            self._of(function.__module__, _join(path, name), value)

    def _globals(self, path: str, function: types.FunctionType) -> None:
        """Values of the globals that it names; of modules, of the attributes that it names."""
        names, around = names_in(function.__code__), function.__globals__
        for name in sorted(names.of_globals & around.keys()):
            self._of(function.__module__, _join(path, name), around[name])
            if isinstance(around[name], types.ModuleType):
                self._attributes(_join(path, name), around[name], names.of_attributes, {id(around[name])})

    def _attributes(self, path: str, module: types.ModuleType, names: set[str], seen: set[int]) -> None:
        """Of a module; of the modules in it too."""
        for name in sorted(names & vars(module).keys()):
            value, where = vars(module)[name], _join(path, name)
            if not isinstance(value, types.ModuleType):
                self._of(module.__name__, where, value)
            elif id(value) not in seen and value.__name__.split(".")[0] not in OWN:
                self._attributes(where, value, names, seen | {id(value)})

    def _namespace(self, path: str, cls: type) -> None:
        """A class by itself: its name, and what a user keeps in it, as in a config."""
        self._say(path, name_of(cls))
        for c in [] if issubclass(cls, enum.Enum) else users_of(cls):
            for name, value in vars(c).items():
                if not name.startswith("_") and not callable(value) and not hasattr(value, "__get__"):
                    self._of(c.__module__, _join(path, name), value)

    def _of(self, module: str | None, path: str, value: object) -> None:
        """What a class or a function of ``module`` reads. What of it cannot be told is a library's affair."""
        if not is_installed(module):
            return self.visit(path, value)
        outside, self.entries = self.entries, self.library
        with suppress(ValueError):
            self.visit(path, value)
        self.entries = outside
        return None

    def _code(self, path: str, cls: type) -> None:
        """The class, and what the user's part of it computes: its functions and its attributes."""
        if not (users := users_of(cls)):
            return
        digest = hashlib.sha256()
        for c in users:
            digest.update(c.__qualname__.encode())
            for name, value in sorted(vars(c).items()):
                if name == "__init__":  # what it leaves is found in the attributes
                    continue
                where = _join(path, f"{c.__name__}.{name}")
                value = next((getattr(value, n) for n in UNWRAPPED if hasattr(value, n)), value)
                if isinstance(value, types.FunctionType):
                    digest.update(f"{name} {digest_of_code(value.__code__)}".encode())
                    self._globals(where, value)
                    self._bound(where, value)
                elif not name.startswith(("__", "_abc_")):
                    self._of(c.__module__, where, value)
        self._say(_join(path, f"{cls.__name__}()"), digest.hexdigest())

    def _tensor(self, path: str, value: Tensor | np.ndarray) -> None:
        try:
            self._say(path, digest_of(value))
        except (TypeError, RuntimeError):  # objects, texts; sparse, quantised
            raise indistinct(path, value) from None

    def _see(self, path: str, value: object) -> None:
        self._seen[id(value)] = path
        self._alive.append(value)

    def _say(self, path: str, text: str) -> None:
        self.entries[path or "model"] = text


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
