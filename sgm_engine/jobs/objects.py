"""What Python objects keep where: attributes, slots, state of C's; and whose their classes and functions are."""

from __future__ import annotations

import functools
import sys
import types

import numpy as np
import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.dtype, np.generic)
# Their code is taken as it is: PyTorch's version and this package's are part of a job by themselves.
OWN = {"sgm_engine", "torch", "numpy", *sys.stdlib_module_names} - {"__main__"}


def fields_of(value: object) -> dict[str, object]:
    """Attributes, those in slots too."""
    slots = (name for c in type(value).__mro__ for name in _as_names(vars(c).get("__slots__", ())))
    found = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return found | getattr(value, "__dict__", {})


def users_of(cls: type) -> list[type]:
    """The class and its bases, less those whose code is taken as it is."""
    return [c for c in cls.__mro__ if c.__module__.split(".")[0] not in OWN]


def is_installed(module: str | None) -> bool:
    """Whether the module of this name belongs to an installed library, and not to the user's own program."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def is_cache(value: object, name: str) -> bool:
    """Whether the attribute is what a cached property has found."""
    return isinstance(getattr(type(value), name, None), functools.cached_property)


def has_more(cls: type) -> bool:
    """Whether its objects keep more than attributes, in C: a lock, a generator of random numbers, a file."""
    slots = sum(len(_as_names(vars(c).get("__slots__", ()))) for c in cls.__mro__)
    places = slots + (cls.__dictoffset__ != 0) + (cls.__weakrefoffset__ != 0)
    return cls.__itemsize__ != 0 or cls.__basicsize__ > object.__basicsize__ + places * tuple.__itemsize__


def _as_names(slots: object) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def is_plain(value: object) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(v, PLAIN) for v in value))


def name_of(value: object) -> str:
    """Its name and where it is from, as long as that is no path."""
    if isinstance(value, types.ModuleType):  # whose repr says where it is installed
        return value.__name__
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
