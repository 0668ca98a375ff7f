"""Image data sets in their usual binary files, as uint8 tensors [N, C, H, W]."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_idx(path: str | Path) -> Tensor:
    """One IDX file of unsigned bytes (MNIST's format; gzipped if it ends in .gz) → uint8 tensor of its own shape."""
    path = Path(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        raw = file.read()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (it starts with {raw[:4].hex()})")
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, 4).astype(int).tolist()
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if body.size != math.prod(shape):
        raise ValueError(f"{path}: {body.size} bytes of data for shape {shape}; the file is truncated or damaged")
    return torch.from_numpy(body.reshape(shape).copy())


def load_mnist(folder: str | Path, split: str = "train") -> Tensor:
    """MNIST images of ``split`` ("train" or "t10k") → uint8 [N, 1, 28, 28]."""
    folder = Path(folder)
    for name in (f"{split}-images-idx3-ubyte.gz", f"{split}-images-idx3-ubyte"):
        if (folder / name).is_file():
            return read_idx(folder / name)[:, None]
    raise FileNotFoundError(f"{folder}: no {split}-images-idx3-ubyte(.gz) there; pass the folder of MNIST's IDX files")


def dequantise(images: Tensor, uniform: Tensor) -> Tensor:
    """uint8 and U ~ uniform [0, 1) of the same shape → float32 in [0, 1): x/255·255/256 + U/256 (NCSN's own map)."""
    return (images.to(torch.float32) + uniform) / 256
