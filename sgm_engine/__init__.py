"""A custom-kernel sampler engine for noise-conditional score models."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sgm_engine.bundled import load_bundled
    from sgm_engine.checkpoint import load_checkpoint
    from sgm_engine.engine import Engine
    from sgm_engine.plan import Plan, annealed_langevin

# Imported when first asked for, so that `import sgm_engine` and `sgm --help` do not wait for PyTorch.
_HOMES = {
    "Engine": "engine",
    "Plan": "plan",
    "annealed_langevin": "plan",
    "load_bundled": "bundled",
    "load_checkpoint": "checkpoint",
}
__all__ = ["Engine", "Plan", "annealed_langevin", "load_bundled", "load_checkpoint"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
