"""The layers of a native network as Python builds them: one method of ``Graph`` a layer of csrc/cpu/executor.

What a norm and an activation do to a layer's input, and what bias, residuals and a pool do to its output, belongs to
the layer that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgm_engine import _C
from sgm_engine.native_norm import Norm, Table, Unsupported, norm_of

# "direct" and "winograd" are float32 by one algorithm wherever it applies, "float32" by the cheaper of the two a layer.
PRECISIONS = ("float32", "bfloat16", "direct", "winograd")


class Value(NamedTuple):
    """A tensor of the graph: its index and its shape in one image."""

    id: int
    channels: int
    height: int
    width: int


@dataclass
class _Weights:
    """Parameters that C++ keeps a packed copy of: how to pack them, and what they were when it last happened."""

    tensors: tuple[Tensor | None, ...]
    pack: Callable[[], None]
    seen: tuple | None = None

    def state(self) -> tuple:
        """Where the parameters are and what they hold: a version does not count what is written through ``.data``."""
        return tuple(None if t is None else (t.data_ptr(), t._version, _sum(t)) for t in self.tensors)

    def refresh(self) -> bool:
        if self.seen == (now := self.state()):
            return False
        with torch.no_grad():
            self.pack()
        self.seen = now
        return True


def _sum(t: Tensor) -> float:
    return t.detach().sum(dtype=torch.float64).item()


def _given(t: Tensor | None) -> tuple[int, int]:
    """Address and size of a float32 tensor, as C++ takes it."""
    return (0, 0) if t is None else (t.data_ptr(), t.numel())


def _float32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to(torch.float32).contiguous()


class Graph:
    """Builds the layers of one network for images of one size; every method emits one layer and returns its output."""

    def __init__(self, batch: int, precision: str):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        self.native = _C.NativeExecutor(batch, getattr(_C.Precision, precision))
        self.weights: list[_Weights] = []
        self.convs: list[int] = []

    def load(self, channels: int, height: int, width: int, scale: float = 1.0, shift: float = 0.0) -> Value:
        """scale·x + shift of the network's input x [channels, height, width]."""
        return self._layer(_C.Op.load, None, (channels, height, width), scale=scale, shift=shift)

    def conv(
        self,
        x: Value,
        conv: nn.Conv2d,
        norm: nn.Module | Norm | None = None,
        activation: str = "none",
        add: Sequence[Value] = (),
        pool: bool = False,
    ) -> Value:
        """conv(activation(norm(x))), its 2×2 mean if ``pool``, plus at most two addends."""
        index, height, width = self._conv(conv, x, pool)
        shape = (conv.out_channels, height, width)
        return self._layer(_C.Op.conv, x, shape, add=add, norm=norm, activation=activation, conv=index)

    def store(self, x: Value, conv: nn.Conv2d, norm: nn.Module | Norm | None = None, activation: str = "none") -> None:
        """The network's output: conv(activation(norm(x)))."""
        index, height, width = self._conv(conv, x, False)
        if (height, width) != (x.height, x.width) or conv.stride != (1, 1):
            raise Unsupported(f"{conv}: the last convolution must keep the size")
        self._layer(_C.Op.store, x, None, norm=norm, activation=activation, conv=index)

    def activate(
        self, x: Value, activation: str, norm: nn.Module | Norm | None = None, add: Sequence[Value] = ()
    ) -> Value:
        """activation(norm(x)), plus at most two addends."""
        return self._layer(_C.Op.activate, x, x[1:], add=add, norm=norm, activation=activation)

    def mean_pool(self, x: Value, norm: nn.Module | Norm | None = None, activation: str = "none") -> Value:
        """2×2 mean of activation(norm(x)), stride 2."""
        shape = (x.channels, x.height // 2, x.width // 2)
        return self._layer(_C.Op.mean_pool, x, shape, norm=norm, activation=activation)

    def pool5(self, x: Value, kind: str, norm: nn.Module | Norm | None = None, activation: str = "none") -> Value:
        """5×5 pool of activation(norm(x)), stride 1: its "mean", padding counted as zeros, or its "max"."""
        op = _C.Op.mean_pool5 if kind == "mean" else _C.Op.max_pool5
        return self._layer(op, x, x[1:], norm=norm, activation=activation)

    def upsample(self, x: Value, height: int, width: int, add: Sequence[Value] = ()) -> Value:
        """Bilinear, corners aligned, plus at most two addends."""
        return self._layer(_C.Op.upsample, x, (x.channels, height, width), add=add)

    def nearest(self, x: Value, height: int, width: int, add: Sequence[Value] = ()) -> Value:
        """Every pixel repeated, to whole multiples of the size, plus at most two addends."""
        return self._layer(_C.Op.nearest, x, (x.channels, height, width), add=add)

    def concat(self, x: Value, second: Value) -> Value:
        """The channels of x, then those of second."""
        return self._layer(_C.Op.concat, x, (x.channels + second.channels, x.height, x.width), second=second)

    def divide_by(self, divisor: Table) -> None:
        """Divide the output by the number [levels, 1] of the level."""

        def pack() -> None:
            values = _float32(divisor.make())
            self.native.set_sigmas(_given(values))

        self._keep(divisor.tensors, pack)

    def plan(self) -> None:
        """Choose algorithms, lay out memory and pack every weight; no layer can be added after it."""
        self.native.plan()
        self.sync()

    def sync(self) -> int:
        """Pack the weights that changed since the last time; returns how many layers' they were."""
        return sum(w.refresh() for w in self.weights)

    def run(self, x: Tensor, level: Tensor, score: Tensor) -> Tensor:
        """One evaluation of x [B, C, H, W] at level [B] into score; all contiguous, nothing checked but the levels."""
        self.native.run(x.data_ptr(), level.data_ptr(), score.data_ptr(), len(x))
        return score

    def _keep(self, tensors: tuple[Tensor | None, ...], pack: Callable[[], None]) -> None:
        self.weights.append(_Weights(tensors, pack))

    def _layer(
        self,
        op,
        x: Value | None,
        shape: tuple[int, int, int] | None,
        *,
        second: Value | None = None,
        add: Sequence[Value] = (),
        norm: nn.Module | Norm | None = None,
        activation: str = "none",
        conv: int = -1,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> Value | None:
        out = None if shape is None else Value(self.native.tensor(*shape), *shape)
        self.native.layer(
            op=op,
            input=-1 if x is None else x.id,
            second=-1 if second is None else second.id,
            output=-1 if out is None else out.id,
            add=[a.id for a in add],
            norm=-1 if norm is None else self._norm(norm),
            activation=getattr(_C.Activation, activation),
            conv=conv,
            scale=scale,
            shift=shift,
        )
        return out

    def _conv(self, conv: nn.Conv2d, x: Value, pool: bool) -> tuple[int, int, int]:
        """The index of a convolution of x, and the height and width of what it makes."""
        k, d, s, p = (_square(getattr(conv, name)) for name in ("kernel_size", "dilation", "stride", "padding"))
        if None in (k, d, s, p) or k > 7 or 2 * p > d * (k - 1) or conv.groups != 1 or conv.padding_mode != "zeros":
            raise Unsupported(
                f"{conv}: only square ungrouped convolutions up to 7×7 that do not enlarge, padded by zeros"
            )
        if pool and (k, d, s, p) != (3, 1, 1, 1):
            raise Unsupported(f"{conv}: a 2×2 mean after anything but an undilated 3×3 convolution")
        size = [n // 2 if pool else (n + 2 * p - d * (k - 1) - 1) // s + 1 for n in x[2:]]
        if min(size) < 1:
            raise Unsupported(f"{conv}: images of {x.height}×{x.width} are too small for it")
        index = self.native.conv(conv.in_channels, conv.out_channels, k, d if k > 1 else 1, s, p, pool)
        self.convs.append(index)

        def pack() -> None:
            weight, bias = _float32(conv.weight), _float32(conv.bias)
            self.native.set_conv(index, _given(weight), _given(bias))

        self._keep((conv.weight, conv.bias), pack)
        return index, *size

    def _norm(self, norm: nn.Module | Norm) -> int:
        norm = norm if isinstance(norm, Norm) else norm_of(norm)
        index = self.native.norm(norm.channels, norm.groups, norm.rows, norm.rows > 1, norm.has_alpha, norm.eps)

        def pack() -> None:
            table = norm.table()
            self.native.set_norm(index, _given(table))

        self._keep(norm.tensors, pack)
        return index


def _square(pair: object) -> int | None:
    """n of (n, n)."""
    return pair[0] if isinstance(pair, tuple) and pair[0] == pair[1] else None
