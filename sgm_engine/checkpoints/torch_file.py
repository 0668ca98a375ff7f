"""A .pth file read as data. There is no unpickler here, so nothing in a file can run.

torch.save writes a pickle program that rebuilds the object, and the storages beside it. The thirty opcodes that such a
program needs are interpreted below on plain dicts, lists and ``StoredTensor`` records; the names that it may refer to
are a fixed table. Anything else ends in CheckpointError. Both layouts: zip (torch ≥ 1.6) and the stream before it.
Sizes are checked against the bytes that are there before a tensor is made, so memory is bounded by the file.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import pickletools
import reprlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sgm_engine.files.reading import DAMAGE, MAX_DIMS, ZipFile, open_file

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
MAX_OPCODES = 1_000_000  # a checkpoint of a thousand tensors and its optimizer takes 50,000

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


class CheckpointError(ValueError):
    """A file that will not be loaded: one line that says which, why, and what to do."""


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


class Storage(NamedTuple):
    """``numel`` values of ``dtype`` under the name ``key``, not read yet."""

    dtype: torch.dtype
    key: str
    numel: int


class StoredTensor(NamedTuple):
    """A tensor described, not read yet; offset and stride count elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


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
                raise CheckpointError(f"is damaged or not a torch file ({_short(error)})") from None
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
            raise CheckpointError(f"is damaged ({_short(error)})") from None
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
        return _interpret(io.BytesIO(self._zip.read(programs[0])))

    def _open_stream(self) -> object:
        """Pickles of magic number, version, machine facts, object, storage keys; then each storage: count, values."""
        if not self._size:
            raise CheckpointError("is empty")
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._bytes[:1] != b"\x80" or _interpret(self._bytes) != LEGACY_MAGIC:
            raise CheckpointError("is neither a torch file nor safetensors")
        version = _interpret(self._bytes)
        if type(version) is not int or version != LEGACY_VERSION:
            raise CheckpointError(
                f"has version {_short(reprlib.repr(version))} of the old torch layout, expected {LEGACY_VERSION}"
            )
        machine = _interpret(self._bytes)
        if not isinstance(machine, dict) or machine.get("little_endian") is not (sys.byteorder == "little"):
            raise CheckpointError(f"was written on a machine of another byte order than this one ({sys.byteorder})")
        used: dict[str, Storage] = {}
        content = _interpret(self._bytes, used)
        keys = _interpret(self._bytes)
        if (
            not isinstance(keys, list)
            or any(type(key) is not str for key in keys)
            or set(keys) != set(used)
            or len(keys) != len(used)
        ):
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


def _interpret(stream, storages: dict[str, Storage] | None = None) -> object:
    """The value of the pickle program at ``stream``, which is left behind it. storages collects what it refers to."""
    stack: list = []
    marks: list[list] = []  # the stacks below each open mark
    memo: dict[int, object] = {}
    copied = 0  # pairs of dicts that were made of lists; a list may be used again and again
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_OPCODES:
            raise CheckpointError(f"describes its content in more than {MAX_OPCODES} opcodes, where thousands would do")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                (value,) = stack
                return value
            case "MARK":
                marks.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "TUPLE":
                items, stack = tuple(stack), marks.pop()
                stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                items, stack = stack, marks.pop()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(stack[-1], dict)[_key(key)] = value
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _expect(stack[-1], dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "GLOBAL":
                if arg not in _STORAGES and arg not in _REBUILD:
                    raise CheckpointError(
                        f"refers to {'.'.join(arg.split())[:80]}, which weights do not need; nothing was run. "
                        "If you trust its origin, save only the tensors (a state_dict) again, best as .safetensors"
                    )
                stack.append(_Name(arg))
            case "REDUCE":
                args, name = _expect(stack.pop(), tuple), stack.pop()
                copied += (
                    sum(len(a) for a in args if type(a) in (list, tuple)) if len(args) <= MAX_DIMS else MAX_OPCODES
                )
                if copied >= MAX_OPCODES:
                    raise CheckpointError("describes its content in more steps than weights do")
                stack.append(_REBUILD[_expect(name, _Name)](*args))
            case "BUILD":  # a state_dict's version notes
                stack.pop()
                _expect(stack[-1], dict)
            case "BINPERSID":
                storage = _storage(*stack.pop())
                if storages is not None and storages.setdefault(storage.key, storage) != storage:
                    raise CheckpointError(f"describes storage {storage.key} in two ways")
                stack.append(storage)
            case other:
                raise CheckpointError(f"uses the pickle opcode {other}, which weights do not need; nothing was run")
    raise EOFError("the pickle has no end")


class _Name(str):
    """A name of _STORAGES or _REBUILD that the program refers to."""


def _key(value) -> str | int:
    """A key of a dict: nothing else, for the hash of a nested tuple has no bound in time or depth."""
    if type(value) not in (str, int):
        raise CheckpointError(f"has a {type(value).__name__} as a key, which weights do not need")
    return value


def _expect(value, kind: type):
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _storage(kind, name, key, _device, numel, view=None) -> Storage:
    if kind != "storage" or view is not None or type(numel) is not int or numel < 0:
        raise CheckpointError("describes a storage in a way that torch.save does not")
    return Storage(_STORAGES[_expect(name, _Name)], _expect(key, str), numel)


def _tensor(storage, offset, shape, stride, *_hooks) -> StoredTensor:
    counts = (offset, *_expect(shape, tuple), *_expect(stride, tuple))
    if (
        len(shape) != len(stride)
        or len(shape) > MAX_DIMS
        or any(type(n) is not int or not 0 <= n < 2**63 for n in counts)
    ):
        raise CheckpointError("describes a tensor in a way that torch.save does not")
    return StoredTensor(_expect(storage, Storage), offset, shape, stride)


_REBUILD = {
    "collections OrderedDict": lambda pairs=(): {_key(key): value for key, value in pairs},
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda data, _requires_grad, _hooks: _expect(data, StoredTensor),
    "torch Size": lambda values: _expect(values, tuple),
}


def _short(error: object) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
