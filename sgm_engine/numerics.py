"""TensorFloat-32 on a GPU, switched for the length of a call: PyTorch's switches are of the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SWITCHING = threading.RLock()  # one at a time: another thread's call would compute with this one's setting
_OPS = ("all", "conv", "matmul")  # "all" first: the others follow it unless they were set themselves


@contextmanager
def float32_math(value: str) -> Iterator[None]:
    """Products of float32 numbers on CUDA are "ieee" or "tf32" (10 bits of mantissa) inside, as they were outside.

    Only what computes otherwise is set, so that what followed another setting before follows it again. The setting is
    seen by every thread of the process meanwhile.
    """
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    with _SWITCHING:
        before = []
        try:
            for op in _OPS:
                was = get("cuda", op)
                if was != value:
                    inherited = op == "all" and was == get("generic", "all")
                    before.append((op, "none" if inherited else was))
                    put("cuda", op, value)
            yield
        finally:
            for op, was in reversed(before):
                put("cuda", op, was)
