"""Doors of packages: public names that are imported when first asked for, so that no package waits for PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazily(package: str, homes: Mapping[str, str | tuple[str, ...]]) -> tuple[Callable, Callable, list[str]]:
    """(__getattr__, __dir__, __all__) of ``package`` (PEP 562). homes: module → the names that it hands out;
    a module is named from the package, or in full."""
    home = {name: module for module, names in homes.items() for name in ([names] if isinstance(names, str) else names)}

    def find(name: str) -> object:
        if name == "_C" and "." not in package:
            return _compiled(package)
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = home[name] if home[name].startswith("sgm_engine.") else f"{package}.{home[name]}"
        return getattr(import_module(module), name)

    return find, lambda: sorted({*vars(sys.modules[package]), *home}), sorted(home)


def _compiled(package: str) -> object:
    """The compiled module of ``package``; ImportError says where it would be built."""
    try:
        return import_module(f"{package}._C")
    except ModuleNotFoundError as error:
        if error.name != f"{package}._C":
            raise
        from sgm_engine.whereabouts import NOT_BUILT

        raise ImportError(NOT_BUILT.format(next(iter(sys.modules[package].__path__)))) from None
