"""Training of score networks: objectives, data, and what runs them under Lightning (the extra [train])."""

from importlib import import_module

# Imported when first asked for: Lightning takes seconds.
_HOMES = {
    "EMA": "callbacks",
    "SampleGrid": "callbacks",
    "Key": "keys",
    "ScoreModule": "module",
    "TrainConfig": "config",
    "tweedie": "multisample",
}
__all__ = ["EMA", "Key", "SampleGrid", "ScoreModule", "TrainConfig", "tweedie"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
