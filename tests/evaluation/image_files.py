"""What the tests of evaluation files share."""

import gzip
import struct

import numpy as np
import pytest

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 3, 6, 5), dtype=np.uint8)


LAST = IMAGES.transpose(0, 2, 3, 1)


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(
        gzip.compress(header + array.tobytes(), mtime=0) if path.suffix == ".gz" else header + array.tobytes()
    )


def write_mnist(folder, n=40, side=8, seed=0):
    """Bright top or bright bottom: two classes that a small network learns at once."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for split, count in (("train", n), ("t10k", n // 2)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        x = rng.integers(0, 100, (count, side, side), dtype=np.uint8)
        for image, label in zip(x, labels, strict=True):
            image[: side // 2 if label else side] += 100
            image[: 0 if label else side // 2] -= 100
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", x)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture
def mnist(tmp_path):
    return write_mnist(tmp_path / "mnist")
