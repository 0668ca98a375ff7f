"""What a value of a recorded network is before a layer makes it: a norm, an activation or an addend still waits.

A norm or an activation waits at its value for the layer that reads it; a convolution waits for its addends, its scale
and its place among others of the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sgm_engine.executors.native.graph import Value
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.layout import Dims, offsets
from sgm_engine.executors.native.norm import Norm, Table, affine

ONE, ZERO = Table.of(1), Table.of(0)
Shape = tuple[int, int, int]
Addend = tuple[Value, float]
Activation = str | tuple[str, float]


@dataclass(frozen=True, eq=False)
class Input:
    """scale·x + shift of the network's input."""

    shape: Shape
    scale: float = 1.0
    shift: float = 0.0
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Read:
    """activation(norm(x)), which the reading layer computes."""

    x: Value
    norm: Norm | None = None
    activation: Activation = "none"
    shared: bool = False  # several layers read it: computed once

    @property
    def shape(self) -> Shape:
        return self.x[1:]

    def then(self, scale: Table, shift: Table) -> Read:
        """scale·x + shift, of a value without activation."""
        return replace(self, norm=(self.norm or affine(self.x.channels)).then(scale, shift))


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution, and what is added to it."""

    read: Read
    kernel: Kernel
    shape: Shape
    add: tuple[Addend, ...] = ()
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """Another layer that takes addends."""

    shape: Shape
    emit: Callable[[Sequence[Addend]], Value]
    add: tuple[Addend, ...] = ()
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Channelwise:
    """A norm over the channels of each pixel: scale·(x − mean)/(after + √(max(square, floor) + eps)) + shift."""

    x: Value
    groups: int
    centred: bool
    eps: float = 0.0
    floor: float = 0.0
    after: float = 0.0
    scale: Table | None = None
    shift: Table | None = None
    activation: Activation = "none"
    add: tuple[Addend, ...] = ()
    shared: bool = False

    @property
    def shape(self) -> Shape:
        return self.x[1:]

    def then(self, scale: Table, shift: Table) -> Channelwise:
        """scale·y + shift, of a norm without activation and addends."""
        own = Norm(self.x.channels, 0, 0.0, (self.scale, None, self.shift)).then(scale, shift)
        return replace(self, scale=own.parts[0], shift=own.parts[2])


Form = Input | Read | Conv | Layer | Channelwise


@dataclass(frozen=True)
class View:
    """gain · a form, seen as a tensor of these dimensions. start: its first channel.

    divisor: what the network's output is divided by, by level. memory: a constant before its pixels, and where among
    its dimensions the pixels are.
    """

    form: Form
    dims: Dims
    start: int = 0
    gain: float = 1.0
    divisor: Table | None = None
    memory: tuple[object, int] | None = None

    def channels(self) -> list[int]:
        """Which of the form's channels it holds, in its own order."""
        return [self.start + i for i in offsets([a for dim in self.dims for a in dim])]


def is_plain(kernel: Kernel) -> bool:
    """Whether it may be the network's last."""
    return (kernel.stride, kernel.up, kernel.groups) == (1, 1, 1)


def identity(channels: int) -> Kernel:
    """A convolution that changes nothing."""
    return Kernel(channels, channels, 1, lambda: torch.eye(channels)[:, :, None, None], lambda: None, ())


def factor_of(form: Form) -> float | None:
    """The number that a form multiplies its value by, if it does nothing else."""
    if not isinstance(form, Read) or form.activation != "none" or form.shared:
        return None
    if form.norm is None:
        return 1.0
    scale, alpha, shift = form.norm.parts
    single = [t for t in (scale, shift) if t is not None]
    if form.norm.groups or alpha is not None or any(t.rows > 1 or t.tensors or t.make().numel() > 1 for t in single):
        return None
    if shift is not None and shift.make().item() != 0:
        return None
    return 1.0 if scale is None else scale.make().item()
