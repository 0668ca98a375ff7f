"""The pickle program of torch.save, interpreted on plain data: dicts, lists, tuples, numbers, texts, StoredTensor.

Every loop is bounded by the length of the program: keys are names or numbers, since the hash of a nested tuple has no
bound; tensors have at most MAX_DIMS dimensions; what is copied again and again is counted.
"""

from __future__ import annotations

import math
import pickletools
from typing import NamedTuple

import torch

from sgm_engine.files.reading import MAX_DIMS

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


def interpret(stream, storages: dict[str, Storage] | None = None) -> object:
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
