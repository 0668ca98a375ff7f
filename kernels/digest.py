"""What tensors hold, in 64 bits each: whoever wrote to one, and however, its digest is another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sgm_engine import _C

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def readable(t: Tensor) -> bool:
    """Whether its bytes lie in this process's memory, where the CPU may read them."""
    return type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided


def digests(tensors: Iterable[Tensor]) -> list[tuple | None]:
    """For each tensor what tells its contents from others: equal where dtype, shape, strides and all bits are.

    A change of one 32-bit word always shows; others are missed by chance alone (csrc/cpu/digest.h). Reads the memory
    once, on all threads of the pool. None: a tensor that the CPU cannot read (a GPU's, a subclass).
    """
    found: list[tuple | None] = []
    memory: list[tuple[int, int]] = []
    held: list[Tensor] = []  # the memory stays while it is read, whatever another thread assigns meanwhile
    for t in tensors:
        if not readable(t):
            found.append(None)
            continue
        alias = t.detach()
        found.append((alias.dtype, alias.shape, alias.stride()))
        if not (alias.is_contiguous() or alias.is_contiguous(memory_format=torch.channels_last)):
            alias = alias.resolve_conj().resolve_neg().contiguous()  # what has gaps
        held.append(alias)
        memory.append((alias.data_ptr(), alias.nbytes))
    words = iter(_C.digest(memory))
    return [about and (*about, next(words)) for about in found]
