"""Digests of tensors, arrays and code, and what code names: for what tells a model from another."""

from __future__ import annotations

import dis
import hashlib
import types
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def digest_of(value: Tensor | np.ndarray) -> str:
    """dtype, shape and sha256 of the elements. TypeError or RuntimeError: they are no plain numbers in one block."""
    tensor = torch.as_tensor(value) if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw(tensor)).hexdigest()}".removeprefix("torch.")


def raw(tensor: Tensor) -> memoryview:
    """The bytes of the elements, in order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def digest_of_code(code: types.CodeType) -> str:
    """sha256 of what it does, not of where it stands."""
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        inner = isinstance(constant, types.CodeType)
        digest.update((digest_of_code(constant) if inner else repr(constant)).encode())
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    return digest.hexdigest()


class Names(NamedTuple):
    of_globals: set[str]
    of_attributes: set[str]


def names_in(code: types.CodeType) -> Names:
    """What a function, or one inside it, names."""
    found = Names(set(), set())
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.of_globals.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found.of_attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = names_in(constant)
            found.of_globals.update(inner.of_globals)
            found.of_attributes.update(inner.of_attributes)
    return found
