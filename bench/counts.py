"""What is counted of two revisions, in processes of their own: memory, packed bytes, calls of PyTorch's operators.

As in bench.workloads: a line each, public names only where there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.small import ncsn, unet2d
from bench.workloads import engine, sample


@dataclass(frozen=True)
class Count:
    """make: sets up and returns numbers by name, or what takes ``memory``. most: this tree's over the base's."""

    make: Callable[[], object]
    most: float = 1.0
    memory: bool = False
    threads: int = 1


def packed(make: Callable[[], object], **options) -> dict[str, int]:
    """Bytes that the C++ executor holds for a network: packed weights, tables and scratch memory."""
    return {"bytes": engine(make, 8, **options)._executor.network.graph.native.bytes()}


def aten_calls(make: Callable[[], object], **options) -> dict[str, int]:
    """Calls of PyTorch's operators in a request, after the first."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    call = sample(make, 1, 7, **options)
    call()
    with Counter() as counter:
        call()
    return {"aten calls": counter.calls}


COUNTS: dict[str, Count] = {
    "an engine, NCSN ngf 64 B=8": Count(lambda: [engine(lambda: ncsn(64), 8)], 1.05, memory=True),
    "a request, NCSN ngf 64 B=8": Count(lambda: [c := sample(lambda: ncsn(64), 8), c()], 1.05, memory=True),
    "a request, UNet2DModel B=8": Count(lambda: [c := sample(unet2d, 8), c()], 1.05, memory=True),
    "packed NCSN ngf 64": Count(lambda: packed(lambda: ncsn(64)), 1.01),
    "packed NCSN ngf 64 bfloat16": Count(lambda: packed(lambda: ncsn(64), precision="bfloat16"), 1.01),
    "packed UNet2DModel": Count(lambda: packed(unet2d), 1.01),
    "a request, NCSN native": Count(lambda: aten_calls(ncsn)),
    "a request, NCSN eager": Count(lambda: aten_calls(ncsn, executor="eager")),
}
