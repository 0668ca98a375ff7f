"""Requests → samples: slots are filled, stepped, harvested. Imports executors and everything below."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "engine": ("Engine",),
        "progress": ("StepInfo",),
    },
)
