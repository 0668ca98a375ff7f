"""Any network → the same on the fused ops: traced, its norms recognised, rewritten. Imports models and kernels."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "acceleration": (
            "Accelerated",
            "accelerate",
        ),
        "float8.config": ("Float8Config",),
    },
)
