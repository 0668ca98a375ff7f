"""A .pth file read as data. There is no unpickler here, so nothing in a file can run.

torch.save writes a pickle program that rebuilds the object, and the storages beside it. The thirty opcodes of such a
program are interpreted (torch_program.py) on plain dicts, lists, ``StoredTensor`` records; the names that it may refer
to are a fixed table. Anything else ends in CheckpointError. Both layouts: zip (torch ≥ 1.6) and the stream before it.
Sizes are checked against the bytes that are there before a tensor is made, so memory is bounded by the file.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import reprlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from sgm_engine.checkpoints.torch_program import CheckpointError, Storage, StoredTensor, interpret
from sgm_engine.files.reading import DAMAGE, ZipFile, open_file, short

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


def check_file(path: Path, sha256: str | None = None) -> None:
    """CheckpointError unless path is a regular file that can be read and (if given) has this sha256, hexadecimal."""
    try:
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 is not None else None
    except IsADirectoryError:
        raise CheckpointError("is not a file") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError("is not a file") from None
    if sha256 is not None and digest != sha256.lower():
        raise CheckpointError(f"has sha256 {digest}, expected {sha256.lower()}: damaged, or another file")


class TorchFile:
    """``with TorchFile(path) as file``: ``file.content`` is what was saved, ``file.read(stored)`` makes one tensor.

    content: dicts, lists, tuples, numbers, strings, None and ``StoredTensor`` in the arrangement that was saved.
    CheckpointError on anything that is not such a file or does not add up.
    """

    def __init__(self, path: Path):
        self._file = open_file(path)
        self._bytes: mmap.mmap | None = None
        try:
            zipped = self._file.read(4) == b"PK\x03\x04"
            self._size = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
            self._zip = ZipFile(self._file) if zipped else None
            self.content = self._open_zip() if zipped else self._open_stream()
        except BaseException as error:
            self.close()
            if isinstance(error, DAMAGE) and not isinstance(error, CheckpointError):
                raise CheckpointError(f"is damaged or not a torch file ({short(error)})") from None
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes.close()
        self._file.close()

    def read(self, stored: StoredTensor) -> Tensor:
        """A tensor of its own memory, of the shape and dtype that were saved."""
        storage, offset, shape, stride = stored
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if math.prod(shape) and (last >= storage.numel or math.prod(shape) > storage.numel):
            raise CheckpointError(
                f"describes a tensor of shape {list(shape)} and strides {list(stride)} in {storage.numel} stored values"
            )
        try:
            raw = self._read_record(storage)
        except DAMAGE as error:
            raise CheckpointError(f"is damaged ({short(error)})") from None
        if not math.prod(shape):
            return torch.empty(shape, dtype=storage.dtype)
        values = torch.frombuffer(bytearray(raw), dtype=storage.dtype)
        return values.as_strided(shape, stride, offset).contiguous()

    def _open_zip(self) -> object:
        entries = self._zip.infolist()
        names = [entry.filename for entry in entries]
        programs = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(programs) != 1 or len(set(names)) != len(names):
            raise CheckpointError("is a zip archive, but not one that torch.save wrote (it needs exactly one data.pkl)")
        if any(entry.compress_type for entry in entries):
            raise CheckpointError("holds compressed entries, which can unpack to any size; torch.save writes none")
        if sum(entry.file_size for entry in entries) > self._size:
            raise CheckpointError("claims more data than the file holds")
        self._prefix = programs[0].removesuffix("data.pkl")
        self._entries = {entry.filename: entry for entry in entries}
        order = self._prefix + "byteorder"
        if order in self._entries and self._zip.read(order) != sys.byteorder.encode():
            raise CheckpointError(f"was written on a machine of another byte order than this one ({sys.byteorder})")
        return interpret(io.BytesIO(self._zip.read(programs[0])))

    def _open_stream(self) -> object:
        """Pickles of magic number, version, machine facts, object, storage keys; then each storage: count, values."""
        if not self._size:
            raise CheckpointError("is empty")
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._bytes[:1] != b"\x80" or interpret(self._bytes) != LEGACY_MAGIC:
            raise CheckpointError("is neither a torch file nor safetensors")
        version = interpret(self._bytes)
        if type(version) is not int or version != LEGACY_VERSION:
            raise CheckpointError(
                f"has version {short(reprlib.repr(version))} of the old torch layout, expected {LEGACY_VERSION}"
            )
        machine = interpret(self._bytes)
        if not isinstance(machine, dict) or machine.get("little_endian") is not (sys.byteorder == "little"):
            raise CheckpointError(f"was written on a machine of another byte order than this one ({sys.byteorder})")
        used: dict[str, Storage] = {}
        content = interpret(self._bytes, used)
        keys = interpret(self._bytes)
        named = isinstance(keys, list) and all(type(key) is str for key in keys)
        if not named or set(keys) != set(used) or len(keys) != len(used):
            raise CheckpointError("lists other storages than its tensors use")
        self._records: dict[str, tuple[int, int]] = {}
        position = self._bytes.tell()
        for key in keys:
            count = int.from_bytes(self._bytes[position : position + 8], "little")
            end = position + 8 + count * used[key].dtype.itemsize
            if count != used[key].numel or end > self._size:
                raise CheckpointError(f"is truncated or damaged: storage {key} should have {used[key].numel} values")
            self._records[key] = position + 8, end
            position = end
        return content

    def _read_record(self, storage: Storage) -> bytes:
        if self._zip is None:
            start, end = self._records[storage.key]
            return self._bytes[start:end]
        entry = self._entries.get(f"{self._prefix}data/{storage.key}")
        needed = storage.numel * storage.dtype.itemsize
        if entry is None or entry.file_size != needed:
            held = "no such entry" if entry is None else f"{entry.file_size} bytes"
            raise CheckpointError(f"claims {needed} bytes of storage {storage.key} where it holds {held}")
        return self._zip.read(entry)  # checks the entry's CRC-32
