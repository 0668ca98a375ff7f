"""What tensors hold, in 64 bits each: whoever wrote to one, and however, its digest is another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sgm_engine import _C

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def digests(tensors: Iterable[Tensor]) -> list[tuple | None]:
    """For each tensor what tells its contents from others: equal where dtype, shape, strides and all bits are.

    A change of one 32-bit word always shows; others are missed by chance alone (csrc/cpu/digest.h). Reads the memory
    once, on all threads of the pool. None: a tensor that the CPU cannot read (a GPU's, a subclass).
    """
    # Aliases keep the memory while it is read, whatever another thread assigns meanwhile. Whole lists: 1 µs a tensor.
    readable = [t.detach() if type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided else None for t in tensors]
    held = [t for t in readable if t is not None]
    about = [(t.dtype, t.shape, t.stride()) for t in held]
    dense = [t if t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last) else _dense(t) for t in held]
    found = zip(about, _C.digest([(t.data_ptr(), t.nbytes) for t in dense]), strict=True)
    return [None if t is None else next(found) for t in readable]


def _dense(t: Tensor) -> Tensor:
    """A copy without gaps."""
    return t.resolve_conj().resolve_neg().contiguous()
