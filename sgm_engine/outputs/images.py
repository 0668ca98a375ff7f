"""Pictures from samples: the conversion to bytes, grids, PNG and GIF."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sgm_engine.files.writing import write_file

if TYPE_CHECKING:
    from torch import Tensor

Range = tuple[float, float]
UNIT: Range = (0.0, 1.0)  # the data range of a model that names none
OVERSHOOT, SHARE = 0.25, 0.01  # values further outside, in units of the range, and how many are no samples' noise


def check_range(data_range: object) -> Range:
    """(low, high) as floats, finite and ascending; ValueError for anything else."""
    try:
        low, high = map(float, data_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"data_range must be (low, high), such as (-1, 1), got {data_range!r:.60}")
    return low, high


def range_of(model: object) -> Range:
    """What ``model.data_range`` says of the data that it was trained on; [0, 1] where it says nothing."""
    own = getattr(model, "data_range", None)
    return UNIT if own is None else check_range(own)


def outside(x: np.ndarray, data_range: Range = UNIT) -> float:
    """The share of the values of x that lie outside the range by more than OVERSHOOT of it."""
    low, high = data_range
    reach = OVERSHOOT * (high - low)
    return np.count_nonzero((x < low - reach) | (x > high + reach)) / max(x.size, 1)


def to_uint8(x: Tensor | np.ndarray, data_range: Range = UNIT, quiet: bool = False) -> np.ndarray:
    """x [N, C, H, W], floating point, data in [low, high] → uint8 [N, H, W, C] = ⌊255·clamp((x−low)/(high−low)) + ½⌋.

    Values outside are clamped, as the original sampler's saved images are. Where more than 1% lie outside by a quarter
    of the range, a warning says so, once (not if quiet). A NaN or an infinity raises ValueError: a cast would turn it
    into a black or white pixel that looks like data.
    """
    low, high = data_range = check_range(data_range)
    if hasattr(x, "is_floating_point"):  # a tensor; NumPy has no bfloat16
        x = x.detach().cpu()
        x = x.float().numpy() if x.is_floating_point() else x.numpy()
    if x.ndim != 4 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"to_uint8: x must be floating point [N, C, H, W], got {x.dtype} {list(x.shape)}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2, 3)))
    if bad.size:
        raise ValueError(f"to_uint8: {bad.size} of {len(x)} samples hold NaN or infinity, first at index {bad[0]}")
    if not quiet and outside(x, data_range) > SHARE:
        warnings.warn(
            f"more than 1% of these values lie outside the data range [{low:g}, {high:g}], by a quarter of it or more, "
            "and are clamped. If the model's data have another range, name it: data_range=(-1, 1), --data-range -1 1. "
            "If not, these samples are far from its data",
            stacklevel=2,
        )
    unit = x if data_range == UNIT else (x - low) / (high - low)
    return np.floor(np.clip(unit, 0, 1).transpose(0, 2, 3, 1) * 255 + 0.5).astype(np.uint8)


def grid(images: np.ndarray, columns: int | None = None, pad: int = 2, background: int = 0) -> np.ndarray:
    """images uint8 [N, H, W, C] → one image uint8 [rows·(H+pad)+pad, columns·(W+pad)+pad, C], in reading order.

    columns defaults to ⌈√N⌉; the last row is filled up with ``background``.
    """
    _check_images(images)
    n, h, w, c = images.shape
    if n == 0:
        raise ValueError("grid: there are 0 images to show")
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1 or pad < 0:
        raise ValueError(f"grid: columns must be at least 1 and pad at least 0, got columns={columns}, pad={pad}")
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, h + pad, w + pad, c), background, np.uint8)
    cells[:n, pad:, pad:] = images
    cells = cells.reshape(rows, columns, h + pad, w + pad, c).transpose(0, 2, 1, 3, 4)
    tiled = cells.reshape(rows * (h + pad), columns * (w + pad), c)
    return np.pad(tiled, ((0, pad), (0, pad), (0, 0)), constant_values=background)


def save_png(path: str | Path, image: np.ndarray) -> None:
    """image uint8 [H, W, C], C = 1 (grey) or 3 (RGB), written as PNG whatever the suffix of path."""
    write_file(path, png_bytes(image))


def png_bytes(image: np.ndarray) -> bytes:
    """image uint8 [H, W, C], C = 1 or 3, as the bytes of a PNG file; the same for the same image."""
    buffer = io.BytesIO()
    _pillow_image(image).save(buffer, format="PNG")
    return buffer.getvalue()


def save_gif(path: str | Path, frames: Sequence[np.ndarray], seconds: float = 4.0, hold: float = 1.5) -> None:
    """frames, each uint8 [H, W, C], as a looping GIF: ``seconds`` long, then its last frame for ``hold`` seconds."""
    if not frames:
        raise ValueError("save_gif: there are 0 frames to show")
    first, *rest = [_pillow_image(frame) for frame in frames]
    each = max(20, round(1000 * seconds / len(frames)))  # milliseconds; viewers slow down anything under 20
    durations = [each] * (len(frames) - 1) + [round(1000 * hold)]
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    write_file(path, buffer.getvalue())


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    check_channels(images.shape[3])


def check_channels(channels: int) -> None:
    """ValueError unless PNG and GIF can show that many channels."""
    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, these samples have {channels}: write .npz or .safetensors")


def _pillow_image(image: np.ndarray):
    from PIL import Image

    _check_images(image[None])
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
