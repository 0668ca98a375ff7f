"""Convolutions as the native executor takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sgm_engine.executors.native.norm import Table, Unsupported

Padding = int | tuple[int, int, int, int]


@dataclass(frozen=True)
class Kernel:
    """A square convolution. weight() → [c_out, c_in / groups, size, size], bias() → [c_out] or None, from ``tensors``.

    padding: on every side, or (top, bottom, left, right); mode: "zeros", "reflect", "replicate" or "circular".
    up: up − 1 zeros are put between the pixels before it (a transposed convolution).
    rows: bias() is [rows, c_out], one row a level; 1: one row for all.
    """

    c_in: int
    c_out: int
    size: int
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None]
    tensors: tuple[Tensor | None, ...]
    stride: int = 1
    padding: Padding = 0
    dilation: int = 1
    mode: str = "zeros"
    groups: int = 1
    up: int = 1
    rows: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d | nn.ConvTranspose2d) -> Kernel:
        """Raises Unsupported for what has no layer."""
        k, d, s = (_square(getattr(conv, name)) for name in ("kernel_size", "dilation", "stride"))
        if None in (k, d, s) or k > 7:
            raise Unsupported(f"{conv}: only square convolutions up to 7×7")
        own = (conv.in_channels, conv.out_channels, k)
        tensors, d = (conv.weight, conv.bias), d if k > 1 else 1
        if not isinstance(conv, nn.ConvTranspose2d):
            padding = _sides(conv.padding, d * (k - 1))
            return cls(
                *own, lambda: conv.weight, lambda: conv.bias, tensors, s, padding, d, conv.padding_mode, conv.groups
            )
        (top, left), (below, right) = ([d * (k - 1) - p for p in conv.padding], conv.output_padding)
        if min(top, left) < 0:
            raise Unsupported(f"{conv}: padding beyond dilation·(kernel_size − 1)")

        def turned() -> Tensor:
            parts = conv.weight.unflatten(0, (conv.groups, -1)).transpose(1, 2)
            return parts.flatten(0, 1).flip(2, 3)

        padding = (top, top + below, left, left + right)
        return cls(*own, turned, lambda: conv.bias, tensors, 1, padding, d, groups=conv.groups, up=s)

    @classmethod
    def stacked(cls, kernels: Sequence[Kernel]) -> Kernel:
        """The outputs of several convolutions of one input, one after another."""
        first, alike = kernels[0], {replace(k, c_out=0, weight=None, bias=None, tensors=()) for k in kernels}
        if len(alike) > 1 or first.groups > 1:
            raise Unsupported("convolutions of one input that differ in more than their outputs")

        def bias() -> Tensor | None:
            parts = [k.bias() for k in kernels]
            zeros = [torch.zeros(k.rows, k.c_out) if k.rows > 1 else torch.zeros(k.c_out) for k in kernels]
            filled = [z if b is None else b for b, z in zip(parts, zeros, strict=True)]
            return None if all(b is None for b in parts) else torch.cat(filled, -1)

        outputs, tensors = sum(k.c_out for k in kernels), tuple(t for k in kernels for t in k.tensors)
        return replace(
            first, c_out=outputs, weight=lambda: torch.cat([k.weight() for k in kernels]), bias=bias, tensors=tensors
        )

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Padding: top, bottom, left, right."""
        return (self.padding,) * 4 if isinstance(self.padding, int) else self.padding

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what it makes of an image."""
        top, bottom, left, right = self.sides
        reach = self.dilation * (self.size - 1)
        room = (self.up * (height - 1) + top + bottom - reach, self.up * (width - 1) + left + right - reach)
        return tuple(n // self.stride + 1 for n in room)

    def scaled(self, number: float) -> Kernel:
        """number · its output."""

        def bias() -> Tensor | None:
            own = self.bias()
            return None if own is None else own * number

        return replace(self, weight=lambda: self.weight() * number, bias=bias)

    def shifted(self, table: Table) -> Kernel:
        """Its output + table, [1 or levels, c_out or 1]."""
        rows = table.rows if self.rows == 1 else self.rows if table.rows == 1 else min(self.rows, table.rows)

        def bias() -> Tensor:
            own, shift = self.bias(), table.make().float()
            own = torch.zeros(self.c_out) if own is None else own.float()
            total = (own[:rows] if self.rows > 1 else own) + (shift[:rows] if table.rows > 1 else shift)
            return total.expand(rows, self.c_out) if rows > 1 else total.reshape(self.c_out)

        return replace(self, bias=bias, rows=rows, tensors=self.tensors + table.tensors)

    def rearranged(self, rows: Sequence[int]) -> Kernel:
        """Output i is this one's output rows[i]; −1: zeros."""
        if self.groups > 1 or not all(-1 <= row < self.c_out for row in rows):
            raise Unsupported(f"outputs {min(rows)} to {max(rows)} of {self.c_out} in {self.groups} groups")
        index = torch.tensor(rows)
        kept = (index >= 0).float()

        def bias() -> Tensor | None:
            own = self.bias()
            return None if own is None else own[..., index.clamp_min(0)] * kept

        def weight() -> Tensor:
            return self.weight()[index.clamp_min(0)] * kept[:, None, None, None]

        return replace(self, c_out=len(rows), weight=weight, bias=bias)

    def split(self, parts: int, unit: int) -> Kernel:
        """The output's channels in ``parts`` equal parts, each padded by zeros to a multiple of ``unit``."""
        own = self.c_out // parts
        rows = [-1 if i >= own else part * own + i for part in range(parts) for i in range(own + -own % unit)]
        return self.rearranged(rows)

    def transposed(self) -> Kernel:
        """What takes the gradient of the output to that of the input, both of one size: at stride 2, spread before.

        Unsupported where stride 1 would change the size.
        """
        plain = (self.groups, self.up, self.rows, self.mode) == (1, 1, 1, "zeros")
        (top, bottom, left, right), reach = self.sides, self.dilation * (self.size - 1)
        kept = self.stride > 1 or (top + bottom, left + right) == (reach, reach)
        if not (plain and kept and max(top, bottom, left, right) <= reach):
            raise Unsupported(f"the gradient of a {self.size}×{self.size} convolution with padding {self.padding}")
        weight = self.weight
        return Kernel(
            self.c_out, self.c_in, self.size, lambda: weight().transpose(0, 1).flip(2, 3), lambda: None,
            self.tensors[:1], 1, (reach - top, top, reach - left, left), self.dilation,
        )  # fmt: skip


def fir(channels: int, taps: Sequence[float] | Tensor, up: int, down: int, padding: Padding) -> Kernel:
    """One filter, [k] (its outer product) or [k, k], on every channel: upfirdn2d of StyleGAN, unflipped."""
    own = torch.as_tensor(taps, dtype=torch.float32)
    own = own[:, None] * own if own.dim() == 1 else own
    if own.dim() != 2 or own.shape[0] != own.shape[1] or len(own) > 7:
        raise Unsupported(f"a filter of shape {tuple(own.shape)}: only square ones up to 7×7")
    top, bottom, left, right = (padding,) * 4 if isinstance(padding, int) else padding
    sides = (top, bottom + up - 1, left, right + up - 1)  # zeros behind the last pixel, too
    tensors = (taps,) if isinstance(taps, Tensor) else ()
    return Kernel(
        channels, channels, len(own), lambda: own.expand(channels, 1, *own.shape), lambda: None, tensors, down, sides,
        groups=channels, up=up,
    )  # fmt: skip


def _sides(padding: str | tuple[int, int], reach: int) -> tuple[int, int, int, int]:
    """Of nn.Conv2d's padding."""
    if isinstance(padding, str):
        before = reach // 2 if padding == "same" else 0
        after = reach - before if padding == "same" else 0
        return before, after, before, after
    return padding[0], padding[0], padding[1], padding[1]


def _square(pair: object) -> int | None:
    """n of (n, n)."""
    return pair[0] if isinstance(pair, tuple) and pair[0] == pair[1] else None
