"""The one reader of pictures: 8 bits a value without loss, or a ValueError that says what is in the way."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np

from sgm_engine.files.limits import Refused, allowance, remedy, size
from sgm_engine.files.reading import short

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
OTHERS = (".tif", ".tiff", ".gif", ".jp2", ".avif", ".heic", ".ppm", ".pgm", ".tga")  # pictures too, and not read
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # whatever the name ends in, no other decoder is asked
BYTES_A_PIXEL = 8  # while it is decoded and converted


def decode_picture(content: bytes) -> np.ndarray:
    """The bytes of a PNG, JPEG, BMP or WebP file → uint8 [H, W, C], C 1 (grey) or 3 (RGB), as viewers turn it.

    Grey stays grey: with an opaque alpha, with 1 to 8 bits, as a palette of greys. 16 bits are read where all values
    are those of 8. ValueError: damaged, transparent, 16 bits, CMYK, several frames, or more pixels than a file may
    ask for (limits.py).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if (need := width * height * BYTES_A_PIXEL) > allowance():
                raise Refused(f"it has {width}×{height} pixels, which take {size(need)}: {remedy(need)}")
            if (frames := getattr(picture, "n_frames", 1)) > 1:
                raise Refused(f"it holds {frames} frames, one belongs in a picture")
            deep = _sixteen_bits(content)
            picture.load()
            return _pixels(ImageOps.exif_transpose(picture), deep)
    except UnidentifiedImageError:
        raise Refused(f"it is not a readable picture of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise Refused(short(error)) from None
    except (OSError, SyntaxError, EOFError, struct.error, KeyError, IndexError, TypeError, OverflowError, MemoryError,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        raise Refused(f"it is not a readable picture ({short(error)})") from None


def _sixteen_bits(content: bytes) -> bool:
    """Whether a PNG's header says 16 bits a value: of colours, Pillow drops the lower 8 without a word."""
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and content[24:25] == b"\x10"


def _pixels(picture: Image.Image, deep: bool) -> np.ndarray:
    if picture.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        return _eight_of_sixteen(np.asarray(picture.convert("I")))
    if deep:
        raise Refused("it has 16 bits a value: convert it to 8 bits first")
    palette = picture.mode in ("P", "PA")
    if "transparency" in picture.info or picture.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        grey = picture.mode in ("1", "L", "LA", "La")
        picture = picture.convert("LA" if grey else "RGBA")
        if picture.getextrema()[-1][0] < 255:
            raise Refused("it has transparent pixels: flatten it over a background first")
        picture = picture.convert("L" if grey else "RGB")
    if picture.mode == "1":
        return np.asarray(picture.convert("L"))[:, :, None]
    if palette:
        return _squeezed(np.asarray(picture.convert("RGB")))
    if picture.mode not in ("L", "RGB"):
        raise Refused(f"it is {picture.mode}, neither grey nor RGB: convert it first")
    return np.atleast_3d(np.asarray(picture))


def _eight_of_sixteen(values: np.ndarray) -> np.ndarray:
    eight, rest = np.divmod(values, 257)
    if rest.any() or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise Refused("it has 16 bits a value: convert it to 8 bits first")
    return eight.astype(np.uint8)[:, :, None]


def _squeezed(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] of nothing but greys, as a palette may hold, → [H, W, 1]."""
    return pixels[:, :, :1] if (pixels == pixels[:, :, :1]).all() else pixels
