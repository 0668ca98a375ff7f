"""Convolutions in float8: which layers, by which scales. Of the rewriting room."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "config": ("Float8Config",),
        "conv": ("Float8Conv",),
    },
)
