"""PyTorch's switches, which belong to the caller, as a call of ours needs them: TensorFloat-32, autocast, inference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

_SWITCHING = threading.RLock()  # one at a time: another thread's call would compute with this one's setting
_OPS = ("all", "conv", "matmul")  # "all" first: the others follow it unless they were set themselves


@contextmanager
def undisturbed() -> Iterator[None]:
    """Tensors made inside can be changed anywhere, and are what was asked for, whatever the caller has switched on.

    A tensor of torch.inference_mode cannot be written to outside of it, and autocast rounds what is called in it.
    """
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def unrounded(method: Callable) -> Callable:
    """``method(self, x, …)`` without autocast: products that decide by small differences, whatever surrounds them."""

    @wraps(method)
    def exact(self, x: torch.Tensor, *args):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args)

    return exact


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
