"""Sets of images wherever they lie, read a block at a time: uint8 [b, C, H, W], so that 50,000 need no memory.

    DATA:train, DATA:test    a folder of MNIST's IDX files or of CIFAR-10's binary ones, gzipped or not; with labels
    x.npz                    `arr_0` uint8 [N, H, W, C], what `sgm sample` and FID tools write
    x.npy                    uint8 or floating point in [0, 1]: [N, H, W], [N, H, W, C] or [N, C, H, W], C being 1 or 3
    x.safetensors            `samples` float [N, C, H, W], as `sgm sample` writes
    folder/                  PNG, JPEG, BMP or WebP files of one size, at any depth; or parts, .npz or .safetensors

Floating point is clamped to its data range and rounded to 8 bits, as in the files that `sgm sample` writes: a set
scores the same in every form. The range is the file's own (a .safetensors that names it), else data_range=, else
[0, 1]; sets with more than 1% of their values far outside are refused. What pictures may be: files/pictures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgm_engine.data.images import channels_first, cifar_records, find_pictures, load_images, read_idx, read_picture
from sgm_engine.files.limits import Refused
from sgm_engine.files.reading import map_npy, npy_header, open_file, open_safetensors, open_zip, parse_json
from sgm_engine.files.storage import refuse_url
from sgm_engine.outputs.images import SHARE, UNIT, Range, check_range, outside, to_uint8

PARTS = (".npz", ".safetensors")
SPLITS = {"train": "train", "test": "t10k"}  # and the first part of the names of MNIST's label files


@dataclass(frozen=True)
class ImageSet:
    """N images of one shape. blocks(size) starts afresh each time; labels: int64 [N] where the data has them."""

    name: str
    shape: tuple[int, int, int]
    count: int
    read: Callable[[int], Iterator[np.ndarray]]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    def blocks(self, size: int = 256) -> Iterator[Tensor]:
        """uint8 [b, C, H, W], b ≤ size, in order."""
        for block in self.read(size):
            yield torch.from_numpy(np.array(block, order="C"))  # a copy: what lies in a file is not writable

    def all(self) -> Tensor:
        return torch.cat([*self.blocks()])

    def take(self, count: int, seed: int = 0) -> ImageSet:
        """``count`` of the images, drawn without replacement; the set itself if it has no more than those."""
        if count >= len(self):
            return self
        chosen = np.zeros(len(self), bool)
        chosen[np.random.default_rng(seed).choice(len(self), count, replace=False)] = True

        def read(size: int) -> Iterator[np.ndarray]:
            start = 0
            for block in self.read(size):
                mask = chosen[start : start + len(block)]
                start += len(block)
                if mask.any():
                    yield block[mask]

        labels = None if self.labels is None else self.labels[torch.from_numpy(chosen)]
        return ImageSet(f"{count} of {self.name}", self.shape, count, read, labels)


def from_array(
    x: Tensor | np.ndarray, name: str = "array", labels: Tensor | None = None, data_range: Range | None = None
) -> ImageSet:
    """A set in memory: uint8 [N, C, H, W], or floating point of that shape, in data_range (None: [0, 1])."""
    data_range = UNIT if data_range is None else check_range(data_range)
    x = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"{name}: images must be [N, C, H, W] with N > 0, got shape {list(x.shape)}")
    return ImageSet(name, x.shape[1:], len(x), lambda size: _slices(x, size, name, data_range), labels)


def open_images(*paths: str | Path, data_range: Range | None = None) -> ImageSet:
    """The images at ``paths`` as one set, in the order given. ValueError or OSError says what is wrong with which.

    data_range: (low, high) of floating point images whose file does not say it; None: [0, 1].
    """
    if not paths:
        raise ValueError("open_images needs at least one path")
    data_range = None if data_range is None else check_range(data_range)
    sets = [_open(str(path), data_range) for path in paths]
    return sets[0] if len(sets) == 1 else _join(sets, f"{len(sets)} files from {sets[0].name}")


def _open(text: str, data_range: Range | None) -> ImageSet:
    refuse_url(text, "images")
    head, colon, split = text.rpartition(":")
    path = Path(head if colon and split in SPLITS else text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there are no images at {text}: no such file or folder")
    if path.is_dir():
        return _open_folder(path, split if colon and split in SPLITS else None, data_range)
    if colon and split in SPLITS:
        raise ValueError(f"{text}: a split is for folders of MNIST or CIFAR-10, {path} is a file")
    if path.suffix not in _FILES:
        raise ValueError(f"cannot read images from {path}: use {', '.join(_FILES)} or a folder")
    return _FILES[path.suffix](path, data_range)


def _open_folder(path: Path, split: str | None, data_range: Range | None) -> ImageSet:
    if any(path.glob("*-images-idx3-ubyte*")):
        return _mnist(path, split or "train")
    if any(path.glob("*_batch*.bin*")):
        return _cifar(path, split or "train")
    if split:
        raise ValueError(f"{path}:{split}: neither MNIST's IDX files nor CIFAR-10's *_batch*.bin are there")
    files = find_pictures(path)
    parts = sorted(p for p in path.iterdir() if p.suffix in PARTS)
    if bool(files) == bool(parts):
        has = "both pictures and" if files else "neither pictures nor"
        raise ValueError(f"{path}: there are {has} parts ({', '.join(PARTS)}) there; name the files instead")
    return _pictures(path, files) if files else _join([_open(str(p), data_range) for p in parts], str(path))


def _mnist(folder: Path, split: str) -> ImageSet:
    images = load_images(folder, split, "mnist")
    names = [folder / f"{SPLITS[split]}-labels-idx1-ubyte{end}" for end in (".gz", "")]
    labels = next((torch.tensor(read_idx(name)).long() for name in names if name.is_file()), None)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels in the {split} split")
    return from_array(images, f"{folder}:{split}", labels)


def _cifar(folder: Path, split: str) -> ImageSet:
    """CIFAR-10's binary version: records of one label and 3,072 pixels, red, green, blue."""
    files = sorted(folder.glob("data_batch*.bin*" if split == "train" else "test_batch*.bin*"))
    if not files:
        raise FileNotFoundError(f"{folder}: there is no {split} split of CIFAR-10's binary version")
    records = np.concatenate([cifar_records(file) for file in files])
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    return from_array(records[:, 1:].reshape(-1, 3, 32, 32), f"{folder}:{split}", labels)


def _npy(path: Path, data_range: Range | None) -> ImageSet:
    return from_array(channels_first(map_npy(path), path), str(path), data_range=data_range)


def _npz(path: Path, data_range: Range | None) -> ImageSet:
    """The array is read from within the archive as it is needed."""
    with open_file(path) as file, open_zip(file, path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise Refused(f"has no arr_0, only {[Path(n).stem for n in archive.namelist()][:9]}")
        size = archive.getinfo("arr_0.npy").file_size
        with archive.open("arr_0.npy") as entry:
            shape, dtype = _arr_0(entry)
            start = entry.tell()
        if (needed := dtype.itemsize * int(np.prod(shape, dtype=object))) != size - start:
            raise Refused(f"its arr_0 {list(shape)} takes {needed} bytes, and {size - start} are there")

    def read(block: int) -> Iterator[np.ndarray]:
        with open_file(path) as file, open_zip(file, path) as archive, archive.open("arr_0.npy") as entry:
            _arr_0(entry)
            for first in range(0, shape[0], block):
                count = min(block, shape[0] - first)
                raw = entry.read(count * int(np.prod(shape[1:])) * dtype.itemsize)
                x = channels_first(np.frombuffer(raw, dtype).reshape(count, *shape[1:]), path)
                yield from _slices(x, block, path, data_range or UNIT)

    probe = channels_first(np.broadcast_to(np.empty((), dtype), shape), path)
    return ImageSet(str(path), probe.shape[1:], shape[0], read)


def _arr_0(entry) -> tuple[tuple[int, ...], np.dtype]:
    shape, fortran, dtype = npy_header(entry)
    if fortran or len(shape) < 3 or shape[0] == 0:
        raise Refused(f"arr_0 must be C-ordered [N, H, W, C] with N > 0, got {dtype} {list(shape)}")
    return shape, dtype


def _safetensors(path: Path, data_range: Range | None) -> ImageSet:
    with open_safetensors(path, "np") as file:
        names = list(file.keys())
        if "samples" not in names:
            raise ValueError(f"{path}: has no tensor 'samples', only {names[:9]}")
        shape, note = file.get_slice("samples").get_shape(), (file.metadata() or {}).get("data_range")
    if len(shape) != 4 or shape[0] == 0 or 0 in shape[1:]:
        raise ValueError(f"{path}: samples must be [N, C, H, W] with N > 0, got {shape}")
    own = data_range or UNIT if note is None else _noted(note, path)

    def read(size: int) -> Iterator[np.ndarray]:
        with open_safetensors(path, "np") as file:
            samples = file.get_slice("samples")
            for start in range(0, shape[0], size):
                yield from _slices(samples[start : min(start + size, shape[0])], size, path, own)

    return ImageSet(str(path), tuple(shape[1:]), shape[0], read)


def _noted(note: str, path: Path) -> Range:
    """The data range that a file names."""
    try:
        return check_range(parse_json(note))
    except ValueError as error:
        raise Refused(f"{path}: names no data range in its metadata: {error}") from None


def _pictures(folder: Path, files: list[Path]) -> ImageSet:
    shape = read_picture(files[0]).shape

    def read(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), size):
            images = [read_picture(file, shape[0]) for file in files[start : start + size]]
            for file, image in zip(files[start:], images, strict=False):
                if image.shape != shape:
                    raise ValueError(
                        f"{file} is {image.shape} [C, H, W], but {files[0].name} is {shape}: one size a set"
                    )
            yield np.stack(images)

    return ImageSet(str(folder), shape, len(files), read)


def _join(sets: list[ImageSet], name: str) -> ImageSet:
    for other in sets[1:]:
        if other.shape != sets[0].shape:
            raise ValueError(f"{other.name} holds images {other.shape}, but {sets[0].name} {sets[0].shape}")

    def read(size: int) -> Iterator[np.ndarray]:
        for part in sets:
            yield from part.read(size)

    return ImageSet(name, sets[0].shape, sum(map(len, sets)), read)


def _slices(x: np.ndarray, size: int, name: object, data_range: Range) -> Iterator[np.ndarray]:
    for start in range(0, len(x), size):
        block = np.asarray(x[start : start + size])
        yield block if block.dtype == np.uint8 else _rounded(block, name, data_range)


def _rounded(x: np.ndarray, name: object, data_range: Range) -> np.ndarray:
    """Floating point [b, C, H, W] in the range, but for the noise of samples → uint8. ValueError names the set."""
    if np.issubdtype(x.dtype, np.floating) and (share := outside(x, data_range)) > SHARE:
        low, high = data_range
        raise Refused(
            f"{name}: floating point images lie in [{low:g}, {high:g}], and {share:.0%} of these values do not: they "
            f"go from {x.min():.3g} to {x.max():.3g}; name their range, data_range=(-1, 1) or --data-range -1 1"
        )
    try:
        return to_uint8(x, data_range).transpose(0, 3, 1, 2)
    except ValueError as error:
        raise Refused(f"{name}: {error}") from None


_FILES = {".npz": _npz, ".npy": _npy, ".safetensors": _safetensors}
