"""Samples as bytes and files: pictures, arrays, ranges of ids. Imports files."""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "images": (
            "check_range",
            "grid",
            "png_bytes",
            "range_of",
            "save_gif",
            "save_png",
            "to_uint8",
        ),
        "output": ("Output",),
        "sample_ids": ("SampleIds",),
    },
)
