"""Parameters that the native executor keeps packed copies of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    """Parameters that C++ keeps a packed copy of: how to pack them, and what they were when it last happened."""

    tensors: tuple[Tensor | None, ...]
    pack: Callable[[], None]
    seen: tuple | None = None

    def refresh(self, states: Mapping[int, tuple | None], force: bool = False) -> bool:
        """Pack if a parameter changed, or ``force``. states: id → what it holds (kernels/digest.py), of all of them."""
        now = tuple(states[id(t)] for t in self.tensors if t is not None)
        if not force and self.seen == now and None not in now:
            return False
        with torch.no_grad():
            self.pack()
        self.seen = now
        return True


def given(t: Tensor | None) -> tuple[int, int]:
    """Address and size of a float32 tensor, as C++ takes it."""
    return (0, 0) if t is None else (t.data_ptr(), t.numel())


def as_float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to(torch.float32).contiguous()
