"""What an op that writes into its arguments owes autograd, and the arguments that it reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

Tensors = dict[str, Tensor | None]


def check_no_gradient(op: str, tensors: Tensors, remedy: str = "") -> None:
    """Raises RuntimeError if a gradient would be asked for: what the op has overwritten could not give it."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise RuntimeError(f"{op} has no gradient, and {name} requires one: call it under torch.no_grad(){remedy}")


def check_apart(tensors: Tensors, written: tuple[str, ...], aligned: tuple[str, ...] = ()) -> None:
    """Raises ValueError if one of ``written`` shares memory with another of ``tensors``, all of them dense.

    aligned: names that may be the very tensor that ``written[0]`` is, which is read element by element before it is
    written.
    """
    spans = sorted([(t.data_ptr(), t.nbytes, name in written) for name, t in tensors.items() if t is not None])
    end = written_end = 0
    for start, size, writes in spans:  # a sweep: pairs would take three times as long
        if size and (start < written_end or (writes and start < end)):
            _refuse_overlap(tensors, written, aligned)
        end = max(end, start + size)
        if writes:
            written_end = max(written_end, start + size)


def _refuse_overlap(tensors: Tensors, written: tuple[str, ...], aligned: tuple[str, ...]) -> None:
    for target in written:
        for name, t in tensors.items():
            w = tensors[target]
            if name == target or t is None or not (t.nbytes and w.nbytes):
                continue
            if t.data_ptr() >= w.data_ptr() + w.nbytes or w.data_ptr() >= t.data_ptr() + t.nbytes:
                continue
            same = t.data_ptr() == w.data_ptr() and t.dtype == w.dtype and t.stride() == w.stride()
            if not (same and target == written[0] and name in aligned):
                raise ValueError(f"{name} shares memory with {target}, which is written: pass {name}.clone()")


def mark_written(*tensors: Tensor) -> None:
    """Raise their version counters, by which autograd knows that a saved tensor is no longer what it was."""
    increment_version(tensors)
