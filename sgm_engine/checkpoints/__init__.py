"""Files of weights → models, read as data and never executed; and back. Imports models, plans and outputs."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "bundled": (
            "bundled_names",
            "bundled_path",
            "load_bundled",
            "plan_for",
        ),
        "checkpoint": (
            "CheckpointError",
            "convert",
            "load_checkpoint",
            "save_checkpoint",
        ),
    },
)
