"""Parameters that the native executor keeps packed copies of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    """Parameters that C++ keeps a packed copy of: how to pack them, and what they were when it last happened."""

    tensors: tuple[Tensor | None, ...]
    pack: Callable[[], None]
    seen: tuple | None = None

    def refresh(self, states: dict[int, tuple]) -> bool:
        """Pack if a parameter changed. states: of those looked at so far, which others may hold as well."""
        for t in self.tensors:
            if t is not None and id(t) not in states:
                states[id(t)] = _state(t)
        now = tuple(states.get(id(t)) for t in self.tensors)
        if self.seen == now:
            return False
        with torch.no_grad():
            self.pack()
        self.seen = now
        return True


def _state(t: Tensor) -> tuple:
    """Where it is and what it holds: a version does not count what is written through ``.data``."""
    return t.data_ptr(), t._version, t.detach().sum(dtype=torch.float64).item()


def given(t: Tensor | None) -> tuple[int, int]:
    """Address and size of a float32 tensor, as C++ takes it."""
    return (0, 0) if t is None else (t.data_ptr(), t.numel())


def as_float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to(torch.float32).contiguous()
