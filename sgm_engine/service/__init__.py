"""Requests of many threads in one running batch. Imports the engine."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "service": ("SamplerService",),
    },
)
