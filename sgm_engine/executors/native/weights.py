"""Parameters that the native executor keeps packed copies of, and convolutions as it takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.executors.native.norm import Unsupported


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


@dataclass(frozen=True)
class Kernel:
    """A square convolution. weight() → [c_out, c_in, size, size], bias() → [c_out] or None, from ``tensors``."""

    c_in: int
    c_out: int
    size: int
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]
    tensors: tuple[Tensor | None, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Kernel:
        """Raises Unsupported for what has no layer."""
        k, d, s, p = (_square(getattr(conv, name)) for name in ("kernel_size", "dilation", "stride", "padding"))
        if None in (k, d, s, p) or k > 7 or 2 * p > d * (k - 1) or conv.groups != 1 or conv.padding_mode != "zeros":
            raise Unsupported(
                f"{conv}: only square ungrouped convolutions up to 7×7 that do not enlarge, padded by zeros"
            )
        tensors = (conv.weight, conv.bias)
        dilation = d if k > 1 else 1
        return cls(
            conv.in_channels, conv.out_channels, k, lambda: conv.weight, lambda: conv.bias, tensors, s, p, dilation
        )

    def output(self, height: int, width: int) -> tuple[int, int]:
        reach = self.dilation * (self.size - 1) + 1
        return tuple((n + 2 * self.padding - reach) // self.stride + 1 for n in (height, width))

    def transposed(self) -> Kernel:
        """What takes the gradient of the output to that of the input, at stride 1; Unsupported if the size changes."""
        if 2 * self.padding != self.dilation * (self.size - 1):
            raise Unsupported(f"the gradient of a {self.size}×{self.size} convolution with padding {self.padding}")
        tensors = self.tensors[:1]

        def flipped() -> Tensor:
            return self.weight().transpose(0, 1).flip(2, 3)

        return Kernel(self.c_out, self.c_in, self.size, flipped, lambda: None, tensors, 1, self.padding, self.dilation)

    def split(self, parts: int, unit: int) -> Kernel:
        """The output's channels in ``parts`` equal parts, each padded by zeros to a multiple of ``unit``."""
        own = self.c_out // parts
        extra = -own % unit
        padded = own + extra

        def weight() -> Tensor:
            return F.pad(self.weight().unflatten(0, (parts, own)), (0, 0) * 3 + (0, extra)).flatten(0, 1)

        def bias() -> Tensor | None:
            own_bias = self.bias()
            return None if own_bias is None else F.pad(own_bias.unflatten(0, (parts, own)), (0, extra)).flatten()

        return Kernel(self.c_in, parts * padded, self.size, weight, bias, self.tensors, self.stride, self.padding)


def _square(pair: object) -> int | None:
    """n of (n, n)."""
    return pair[0] if isinstance(pair, tuple) and pair[0] == pair[1] else None
