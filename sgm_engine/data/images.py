"""Training images as one uint8 array [N, C, H, W], and the order in which a run reads it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sgm_engine.files.limits import Refused, allowance
from sgm_engine.files.pictures import OTHERS, SUFFIXES, decode_picture
from sgm_engine.files.reading import MAX_DIMS, map_npy, read_bytes, read_gzipped
from sgm_engine.files.storage import refuse_url
from sgm_engine.keys import Key

FORMATS = ("mnist", "cifar10", "npy", "folder")
ORDER = 2**32 - 1  # the draw that shuffles an epoch; its sample id is the epoch's number


def load_images(path: str | Path, split: str = "train", form: str | None = None, size: int | None = None) -> np.ndarray:
    """Images of ``split`` ("train" or "test") under ``path``, uint8 [N, C, H, W]; a .npy stays on the disk, mapped.

    form: one of FORMATS, None finds out. mnist: a folder of IDX files; cifar10: a folder of data_batch_*.bin and
    test_batch.bin; both may be gzipped. npy: uint8 [N, C, H, W] or [N, H, W, C]. folder: pictures, at any depth, cut to
    a square in the middle and scaled to ``size`` pixels; grey if the first one is. Of the others ``size`` divides the
    side, and each pixel is the mean of a block. npy and folder: a split is the file or folder of that name inside
    ``path`` (train.npy, test/); without one, ``path`` is the training data and "test" is empty.
    """
    refuse_url(path, "images")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    form = form or _form(path)
    if form not in FORMATS:
        raise ValueError(f"data format must be one of {', '.join(FORMATS)}, got {form!r}")
    if form in ("mnist", "cifar10"):
        return _shrunk(_mnist(path, split) if form == "mnist" else _cifar10(path, split), size)
    name = f"{split}.npy" if form == "npy" else split
    if path.is_dir() and (path / name).exists():
        path = path / name
    elif split != "train":
        return np.empty((0, 1, 1, 1), np.uint8)
    return _shrunk(_npy(path), size) if form == "npy" else _folder(path, size)


def load_labels(path: str | Path, split: str = "train") -> np.ndarray | None:
    """Class of each image that ``load_images`` gives, int64 [N]; None where there are none.

    MNIST's and CIFAR-10's own; beside train.npy, train_labels.npy, whole numbers [N].
    """
    path = Path(path).expanduser()
    form = _form(path)
    if form == "mnist":
        files = _find(path, f"{'t10k' if split == 'test' else 'train'}-labels-idx1-ubyte")
        return read_idx(files[0]).astype(np.int64) if files else None
    if form == "cifar10":
        files = _find(path, "test_batch.bin" if split == "test" else "data_batch_*.bin")
        return np.concatenate([cifar_records(file)[:, 0] for file in files]).astype(np.int64) if files else None
    file = path / f"{split}_labels.npy"
    if form != "npy" or not file.is_file():
        return None
    labels = map_npy(file)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{file}: must hold whole numbers [N], got {labels.dtype} {labels.shape}")
    return np.array(labels, np.int64)


class Batches(IterableDataset):
    """Batches of ``images`` without end, as uint8 tensors [batch, C, H, W], from number ``start`` on, or ``start()``.

    Training sample k is image order(epoch)[k mod N], epoch = k // N. Of the global batch t, samples t·G … (t+1)·G − 1
    with G = batch·world, process ``rank`` reads the rank-th part; so a run is the same however it is divided.

    labels: int64 [N]; batches are then pairs, images and labels [batch].
    rank, world: of this process; None: torch.distributed's, else those of torchrun's environment, else 0 of 1. The
    workers of a DataLoader read every W-th batch each, which it hands out in order.
    state_dict() says how many batches were handed out; after load_state_dict the next iteration goes on from there, in
    a plain loop without workers. To Lightning give training.loader.ImageBatches, which goes by the trainer's count.
    """

    def __init__(
        self,
        images: np.ndarray,
        batch: int,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        start: int | Callable[[], int] = 0,
        labels: np.ndarray | None = None,
    ):
        if len(images) == 0:
            raise ValueError("images: there are none to train on")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: {len(labels)} of {len(images)} images")
        self.images, self.batch, self.seed, self.labels = images, batch, seed, labels
        if (rank is None) != (world is None):
            raise ValueError(f"rank and world: give both or neither, got rank={rank}, world={world}")
        if rank is not None and not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, world), got rank={rank}, world={world}")
        self.rank, self.world, self.start = rank, world, start
        self._next: int | None = None  # the batch to hand out
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        t = (self.start() if callable(self.start) else self.start) if self._next is None else self._next
        t += worker
        while True:
            self._next = t + workers
            yield self.read(t)
            t += workers

    def __getstate__(self) -> dict:
        """For a worker that is started afresh: the process group stays behind."""
        rank, world = self._place()
        return self.__dict__ | {"rank": rank, "world": world}

    def state_dict(self) -> dict[str, int]:
        start = self.start() if callable(self.start) else self.start
        return {"batch": start if self._next is None else self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = int(state["batch"])

    def _place(self) -> tuple[int, int]:
        """(rank, world) of this process."""
        if self.rank is not None:
            return self.rank, self.world
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def read(self, t: int) -> Tensor | tuple[Tensor, Tensor]:
        """This process's part of global batch t."""
        rank, world = self._place()
        first = (t * world + rank) * self.batch
        n = len(self.images)
        index = [self._order(k // n)[k % n] for k in range(first, first + self.batch)]
        x = torch.from_numpy(np.array(self.images[index]))  # a copy, writable and dense
        return x if self.labels is None else (x, torch.from_numpy(self.labels[index]))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            u = Key(self.seed, torch.tensor([epoch]), ORDER).uniform(torch.empty(1, len(self.images)))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = u[0].argsort(stable=True).numpy()
        return self._orders[epoch]


def dequantise(images: Tensor, uniform: Tensor) -> Tensor:
    """uint8 and U ~ uniform [0, 1) of the same shape → float32 in [0, 1]: x/255·255/256 + U/256 (NCSN's own map)."""
    return (images.to(torch.float32) + uniform) / 256


def read_idx(path: str | Path) -> np.ndarray:
    """One IDX file of unsigned bytes (MNIST's format; gzipped if it ends in .gz) → uint8 array of its own shape."""
    raw = read_gzipped(path)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (it starts with {raw[:4].hex()})")
    dims = raw[3]
    if dims > MAX_DIMS or len(raw) < 4 + 4 * dims:
        raise ValueError(f"{path}: says that it has {dims} dimensions; the file is truncated or damaged")
    shape = np.frombuffer(raw, ">u4", dims, 4).astype(int).tolist()
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if body.size != math.prod(shape):
        raise ValueError(f"{path}: {body.size} bytes of data for shape {shape}; the file is truncated or damaged")
    return body.reshape(shape)


def _form(path: Path) -> str:
    names = [path.name] if path.is_file() else [child.name for child in path.iterdir()]
    if any(name.endswith(".npy") for name in names):
        return "npy"
    if any("idx3-ubyte" in name for name in names):
        return "mnist"
    if any(name.startswith("data_batch_") for name in names):
        return "cifar10"
    return "folder"


def _find(folder: Path, name: str) -> list[Path]:
    return sorted([*folder.glob(name), *folder.glob(f"{name}.gz")])


def _mnist(folder: Path, split: str) -> np.ndarray:
    files = _find(folder, f"{'t10k' if split == 'test' else 'train'}-images-idx3-ubyte")
    if not files:
        raise FileNotFoundError(f"{folder}: no {split} images there; pass the folder of MNIST's IDX files")
    return read_idx(files[0])[:, None]


def _cifar10(folder: Path, split: str) -> np.ndarray:
    files = _find(folder, "test_batch.bin" if split == "test" else "data_batch_*.bin")
    if not files:
        raise FileNotFoundError(f"{folder}: no {split} batches there; pass the folder of CIFAR-10's .bin files")
    return np.concatenate([cifar_records(file)[:, 1:].reshape(-1, 3, 32, 32) for file in files])


def cifar_records(file: Path) -> np.ndarray:
    """A file of CIFAR-10's binary version: uint8 [N, 3073], each a label and 3×32×32 pixels, red, green, blue."""
    raw = np.frombuffer(read_gzipped(file), np.uint8)
    if raw.size == 0 or raw.size % 3073:
        raise ValueError(f"{file}: {raw.size} bytes, not a multiple of 3,073 (label and 3×32×32 pixels)")
    return raw.reshape(-1, 3073)


def channels_first(x: np.ndarray, name: object) -> np.ndarray:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] → [N, C, H, W]; C is 1 or 3, and decides which it is."""
    if x.ndim == 3:
        return x[:, None]
    first, last = x.ndim == 4 and x.shape[1] in (1, 3), x.ndim == 4 and x.shape[3] in (1, 3)
    if first == last:
        what = "could be [N, C, H, W] or [N, H, W, C]" if first else "must be [N, H, W], [N, H, W, C] or [N, C, H, W]"
        raise Refused(f"{name}: images {what}, C 1 or 3; got {list(x.shape)}")
    return x if first else x.transpose(0, 3, 1, 2)


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, at any depth, in order of their paths. ValueError: some are of a kind not read."""
    files = sorted(folder.rglob("*"))
    if other := next((f for f in files if f.suffix.lower() in OTHERS), None):
        raise ValueError(f"{other}: pictures must be {', '.join(SUFFIXES)}: convert it, or move it elsewhere")
    return [f for f in files if f.suffix.lower() in SUFFIXES]


def read_picture(file: Path, channels: int | None = None) -> np.ndarray:
    """uint8 [C, H, W], C 1 or 3; ValueError names the file. channels: those of the set: grey becomes RGB, without loss,
    and RGB in a grey set is refused."""
    try:
        pixels = decode_picture(read_bytes(file, allowance())).transpose(2, 0, 1)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    if channels == 1 and len(pixels) == 3:
        raise ValueError(f"{file}: is RGB, and the first picture of its set is grey: make them all the same")
    return np.repeat(pixels, 3, 0) if channels == 3 and len(pixels) == 1 else pixels


def _shrunk(images: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 [N, C, H, H] → [N, C, size, size]: means of square blocks, halves rounded up."""
    n, channels, height, width = images.shape
    if size is None or height == width == size:
        return images
    if height != width or height % size:
        raise ValueError(f"image_size must divide the side of images of {height}×{width}, got {size}")
    block = height // size
    sums = images.reshape(n, channels, size, block, size, block).sum((3, 5), dtype=np.uint32)
    return ((sums + block**2 // 2) // block**2).astype(np.uint8)


def _npy(path: Path) -> np.ndarray:
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if len(files) != 1:
            raise ValueError(f"{path}: holds {len(files)} .npy files; name one, or call it train.npy")
        path = files[0]
    images = map_npy(path)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{path}: must be uint8 [N, C, H, W] or [N, H, W, C], got {images.dtype} {images.shape}")
    return channels_first(images, path)


def _folder(path: Path, size: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    files = find_pictures(path)
    if not files:
        raise FileNotFoundError(f"{path}: no pictures there ({', '.join(SUFFIXES)})")
    if size is None:
        raise ValueError(f"{path}: pass image_size, the pixels that a side of every picture is scaled to")
    channels = len(read_picture(files[0]))
    images = np.empty((len(files), channels, size, size), np.uint8)
    for slot, file in zip(images, files, strict=True):
        pixels = read_picture(file, channels)
        picture = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
        slot[:] = np.atleast_3d(np.asarray(ImageOps.fit(picture, (size, size)))).transpose(2, 0, 1)
    return images
