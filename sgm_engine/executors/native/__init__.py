"""Whole networks in C++ on a CPU. graph.py: the layers · traced.py: any module as layers · executor.py: steps."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "executor": (
            "NativeExecutor",
            "NativeNetwork",
        ),
    },
)
