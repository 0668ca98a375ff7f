"""What tells a model from another: its parameters and buffers as one digest, and whatever else decides its samples.

That is guidance, operators, measurements, flags, containers, closures, code. Each such value is named by where it is
found, so that a refusal can say "the model's weight was 1.5 and is now 7.5".
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import types
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.rewriting.altered import MODAL, altered

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.dtype, np.generic)
BY_NAME = (type, types.ModuleType, types.BuiltinFunctionType, torch.memory_format, torch.layout, type(torch.add))
OWN = ("sgm_engine", "torch", "numpy", "builtins")  # their versions are part of a job by themselves
OF_MODULES = {*vars(nn.Module()), "training"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class ModelIdentity(NamedTuple):
    """weights: sha256, or what the user calls them. settings: empty if the user named the weights."""

    weights: str
    settings: Mapping[str, str]


def identity_of(model: Callable, weights: str | None = None) -> ModelIdentity:
    """weights: the user's name for all of the model; None: what ``weights_digest`` and ``settings`` find."""
    if weights is not None:
        return ModelIdentity(weights, {})
    return ModelIdentity(weights_digest(model), settings(model))


def weights_digest(model: Callable) -> str:
    """sha256 over class, configuration and every parameter and buffer (name, dtype, shape, bytes) of an nn.Module.

    The same network gives the same digest from a .pth, a .safetensors or a trainer. ValueError for a function or a
    module without parameters, which say nothing about themselves.
    """
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise ValueError(
            f"weights: a {type(model).__name__} without parameters cannot be told from another: pass weights='…', "
            "a name or digest that changes whenever the model does"
        )
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if hasattr(getattr(model, "config", None), "to_json"):
        digest.update(model.config.to_json().encode())
    for name, tensor in sorted(chain(model.named_parameters(), model.named_buffers()), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def settings(model: Callable) -> dict[str, str]:
    """{where: value} of whatever is no parameter and no buffer of ``model``; empty for the networks of this package.

    Numbers and texts as they are, tensors and arrays as sha256, functions by their code, defaults, closures and the
    globals that they name. Raises ValueError, naming the argument ``weights``, for what cannot be told from another.
    """
    found = _Walk()
    found.visit("", model)
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        if hooks := getattr(nn.modules.module, name):
            found.visit(f"hooks of all modules: {name}", hooks)
    if found.layers:
        text = "\n".join(f"{where} {value}" for where, value in sorted(found.layers.items()))
        found.entries["layers of torch.nn"] = hashlib.sha256(text.encode()).hexdigest()
    return dict(sorted(found.entries.items()))


class _Walk:
    def __init__(self):
        self.entries: dict[str, str] = {}
        self.layers: dict[str, str] = {}  # of PyTorch's own layers, of which there are many
        self._seen: dict[int, str] = {}
        self._alive: list[object] = []  # an id means something only while its object lives

    def visit(self, path: str, value: object) -> None:
        if isinstance(value, (enum.Enum, *PLAIN)):
            self._say(path, repr(value.item() if isinstance(value, np.generic) else value))
        elif isinstance(value, (Tensor, np.ndarray)):
            self._say(path, _digest(value))
        elif isinstance(value, BY_NAME):
            self._say(path, f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}")
        elif isinstance(value, (Path, range, slice)):
            self._say(path, repr(value))
        elif id(value) in self._seen:
            if self._seen[id(value)] != path:
                self._say(path, f"the same as {self._seen[id(value)] or 'the model'}")
        else:
            self._seen[id(value)] = path
            self._alive.append(value)
            self._inside(path, value)

    def _inside(self, path: str, value: object) -> None:
        if isinstance(value, nn.Module):
            self._module(path, value)
        elif isinstance(value, Mapping):
            for key in value:
                self.visit(f"{path}[{key!r}]", value[key])
        elif isinstance(value, (list, tuple)) and all(isinstance(v, PLAIN) for v in value):
            self._say(path, repr(value))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                self.visit(f"{path}[{i}]", item)
        elif isinstance(value, (set, frozenset)):
            self._say(path, repr(sorted(map(repr, value))))
        elif isinstance(value, functools.partial):
            self.visit(path, value.func)
            self.visit(f"{path}.args", value.args)
            self.visit(f"{path}.keywords", value.keywords)
        elif isinstance(value, types.MethodType):
            self.visit(path, value.__self__)
            self.visit(f"{path}.{value.__name__}", value.__func__)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif fields := _fields(value):
            self._code(path, type(value))
            for name, item in fields.items():
                if not isinstance(getattr(type(value), name, None), functools.cached_property):
                    self.visit(_join(path, name), item)
        else:
            raise ValueError(
                f"weights: {path or 'the model'} is a {type(value).__name__}, which cannot be told from another: pass "
                "weights='…', a name or digest that changes whenever the model does"
            )

    def _module(self, path: str, module: nn.Module) -> None:
        if path:  # in an attribute or a closure: its tensors are not among the model's
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                self._say(_join(path, name), _digest(tensor))
        self._part(path, module, alone=bool(path))

    def _part(self, path: str, part: nn.Module, alone: bool = False) -> None:
        self._seen[id(part)] = path
        self._alive.append(part)
        if hasattr(config := getattr(part, "config", None), "to_json"):  # a network of this package: that is all of it
            if alone:
                self._say(_join(path, "config"), config.to_json())
            return
        self._code(path, type(part))
        if what := altered(part):
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
            hook = name in HOOKS and value
            if hook or (name not in OF_MODULES and not (own and name.startswith("_"))):
                self.visit(_join(path, name), value)
        if of_torch:
            self.layers |= self.entries
            self.entries = outside
        for name, child in part.named_children():
            self._part(_join(path, name), child)

    def _function(self, path: str, function: types.FunctionType) -> None:
        if function.__module__ and function.__module__.split(".")[0] in OWN:
            self._say(f"{path}()", f"{function.__module__}.{function.__qualname__}")
        else:
            self._say(f"{path}()", _code_digest(function.__code__))
            self._globals(path, function)
        self._closure(path, function)
        for i, value in enumerate(function.__defaults__ or ()):
            self.visit(f"{path}.default[{i}]", value)
        for name, value in (function.__kwdefaults__ or {}).items():
            self.visit(_join(path, name), value)
        for name, value in vars(function).items():
            self.visit(_join(path, name), value)

    def _closure(self, path: str, function: types.FunctionType) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # empty: not yet assigned
                continue
            if name != "__class__":
                self.visit(_join(path, name), value)

    def _globals(self, path: str, function: types.FunctionType) -> None:
        """Values of the globals that it names; of modules, of the attributes that it names."""
        names, around = _names(function.__code__), function.__globals__
        for name in sorted(names.of_globals & around.keys()):
            value = around[name]
            self.visit(_join(path, name), value)
            if isinstance(value, types.ModuleType):
                for inner in sorted(names.of_attributes & vars(value).keys()):
                    if not isinstance(vars(value)[inner], types.ModuleType):
                        self.visit(_join(path, f"{name}.{inner}"), vars(value)[inner])

    def _code(self, path: str, cls: type) -> None:
        """The class, and what the user's part of it computes: its functions and its plain attributes."""
        users = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in OWN]
        if not users:
            return
        digest = hashlib.sha256()
        for c in users:
            digest.update(c.__qualname__.encode())
            for name, value in sorted(vars(c).items()):
                if name == "__init__":  # what it leaves is found in the attributes
                    continue
                value = getattr(value, "__func__", getattr(value, "fget", value))
                if isinstance(value, types.FunctionType):
                    digest.update(f"{name} {_code_digest(value.__code__)}".encode())
                    self._globals(_join(path, f"{c.__name__}.{name}"), value)
                    self._closure(_join(path, f"{c.__name__}.{name}"), value)
                elif isinstance(value, PLAIN) and not name.startswith("__"):
                    self.visit(_join(path, f"{c.__name__}.{name}"), value)
        self._say(_join(path, f"{cls.__name__}()"), digest.hexdigest())

    def _say(self, path: str, text: str) -> None:
        self.entries[path or "model"] = text


def _fields(value: object) -> dict[str, object]:
    """Attributes, those in slots too; none of what keeps its state elsewhere (a lock, a generator, a file)."""
    slots = (name for c in type(value).__mro__ for name in _as_names(vars(c).get("__slots__", ())))
    found = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return {} if isinstance(value, torch.Generator) else found | getattr(value, "__dict__", {})


def _as_names(slots: object) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _digest(value: Tensor | np.ndarray) -> str:
    tensor = torch.as_tensor(value) if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}".removeprefix("torch.")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _code_digest(code: types.CodeType) -> str:
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        inner = isinstance(constant, types.CodeType)
        digest.update((_code_digest(constant) if inner else repr(constant)).encode())
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    return digest.hexdigest()


class _Names(NamedTuple):
    of_globals: set[str]
    of_attributes: set[str]


def _names(code: types.CodeType) -> _Names:
    """What a function, or one inside it, names."""
    found = _Names(set(), set())
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.of_globals.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found.of_attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names(constant)
            found.of_globals.update(inner.of_globals)
            found.of_attributes.update(inner.of_attributes)
    return found
