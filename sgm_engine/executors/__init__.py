"""One step, replayed: network, update and counters; eager, packed, native or a CUDA graph.

Imports rewriting, models, plans and kernels.
"""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "choice": (
            "EXECUTORS",
            "make_executor",
        ),
        "eager": ("EagerExecutor",),
        "graphs": ("GraphConfig",),
        "network": ("Network",),
        "protocol": ("Executor",),
        "slots": (
            "Job",
            "Slots",
            "Tables",
        ),
    },
)
