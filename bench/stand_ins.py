"""Libraries that cannot be imported whole without torchvision, of which PyTorch's CPU builds may have no match.

``torchvision()`` puts empty modules in its place, whose names can be imported and do nothing: k-diffusion's and
deepinv's own code then runs, except what would call torchvision. ``k_diffusion()`` is the real sampling and external
modules of the installed package, without the package's __init__, which imports CLIP, kornia, wandb and more.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import pytest


class _Named(type):
    """A class whose every attribute is its own name: transformers reads some where torchvision can be imported."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def torchvision():
    try:
        importlib.import_module("torchvision")
    except Exception:  # absent, or built for another PyTorch, which is a RuntimeError
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())


def k_diffusion():
    """k_diffusion.sampling and k_diffusion.external, or a skip that says what is missing."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None:
            pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
        torchvision()
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["k_diffusion"] = package
    for needed in ("scipy", "torchdiffeq", "torchsde"):
        pytest.importorskip(needed, reason="k-diffusion's samplers import it")
    return (importlib.import_module(f"k_diffusion.{name}") for name in ("sampling", "external"))


def deepinv():
    """The whole library, or a skip that says what is missing."""
    if importlib.util.find_spec("deepinv") is None:
        pytest.skip("deepinv is not installed: pip install --no-deps deepinv")
    torchvision()
    return pytest.importorskip("deepinv", reason="deepinv lacks something it imports", exc_type=ImportError)
