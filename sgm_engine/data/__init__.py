"""Sets of images, for training and for evaluation. Imports checks, keys, outputs."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "images": ("load_images",),
        "sets": ("open_images",),
    },
)
