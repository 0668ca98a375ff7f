"""Classification diffusion models: a classifier of noise levels that samples, and gives the likelihood in one pass."""

from importlib import import_module

_HOMES = {
    "CDM": "model",
    "CDMConfig": "config",
    "Density": "metropolis",
    "MLP": "networks",
    "NoiseClasses": "classes",
    "UNet": "networks",
    "auroc": "likelihood",
    "mala": "metropolis",
}
__all__ = [
    "CDM",
    "MLP",
    "CDMConfig",
    "Density",
    "NoiseClasses",
    "UNet",
    "auroc",
    "mala",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
