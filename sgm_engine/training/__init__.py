"""Training of score networks: objectives, and what runs them under Lightning (the extra [train]). Imports the engine
and everything below, kernels only through it.
"""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "callbacks": (
            "EMA",
            "SampleGrid",
        ),
        "sgm_engine.keys": ("Key",),
        "module": ("ScoreModule",),
        "config": ("TrainConfig",),
        "multisample": ("tweedie",),
    },
)
