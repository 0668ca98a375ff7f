"""The gates to the disk: what a file may ask for, how files are read, how they are written. Imports nothing of ours.

Nothing else of the package opens a file for writing, or a picture, an archive or an array for reading.
"""

from sgm_engine.lazy import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "held": ("HeldFolder",),
        "limits": (
            "check_need",
            "most_bytes",
        ),
        "pictures": ("decode_picture",),
        "reading": (
            "open_file",
            "parse_json",
            "parse_yaml",
            "read_bytes",
            "read_text",
        ),
        "writing": (
            "check_writable",
            "staged",
            "write_file",
        ),
    },
)
