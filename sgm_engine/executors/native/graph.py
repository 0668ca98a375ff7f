"""The layers of a native network as Python builds them: one method of ``Graph`` a layer of csrc/cpu/executor.

What a norm and an activation do to a layer's input, and what bias, residuals and a pool do to its output, belongs to
the layer that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sgm_engine import _C
from sgm_engine.executors.native.norm import Norm, Table, Unsupported, norm_of
from sgm_engine.executors.native.weights import Kernel, Packed, as_float32, given
from sgm_engine.kernels.digest import digests

# "direct" and "winograd" are float32 by one algorithm wherever it applies, "float32" by the cheaper of the two a layer.
PRECISIONS = ("float32", "bfloat16", "direct", "winograd")


class Value(NamedTuple):
    """A tensor of the graph: its index and its shape in one image."""

    id: int
    channels: int
    height: int
    width: int


class Layer(NamedTuple):
    """A layer as it was emitted: what gradient.py goes back through."""

    op: object  # _C.Op
    x: Value | None
    out: Value | None
    second: Value | None
    add: tuple[Value, ...]
    norm: Norm | None
    activation: str
    kernel: Kernel | None


class Graph:
    """Builds the layers of one network for images of one size; every method emits one layer and returns its output."""

    def __init__(self, batch: int, precision: str):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        self.native = _C.NativeExecutor(batch, getattr(_C.Precision, precision))
        self.weights: list[Packed] = []
        self.convs: list[int] = []
        self.layers: list[Layer] = []

    def load(self, channels: int, height: int, width: int, scale: float = 1.0, shift: float = 0.0) -> Value:
        """scale·x + shift of the network's input x [channels, height, width]."""
        return self._layer(_C.Op.load, None, (channels, height, width), scale=scale, shift=shift)

    def conv(
        self,
        x: Value,
        conv: nn.Conv2d | Kernel,
        norm: nn.Module | Norm | None = None,
        activation: str = "none",
        add: Sequence[Value] = (),
        pool: bool = False,
    ) -> Value:
        """conv(activation(norm(x))), its 2×2 mean if ``pool``, plus at most two addends."""
        kernel = conv if isinstance(conv, Kernel) else Kernel.of(conv)
        shape = (kernel.c_out, *self._output(kernel, x, pool))
        return self._layer(_C.Op.conv, x, shape, add=add, norm=norm, activation=activation, kernel=kernel, pool=pool)

    def store(self, x: Value, conv: nn.Conv2d, norm: nn.Module | Norm | None = None, activation: str = "none") -> None:
        """The network's output: conv(activation(norm(x)))."""
        kernel = Kernel.of(conv)
        if self._output(kernel, x) != (x.height, x.width) or kernel.stride != 1:
            raise Unsupported(f"{conv}: the last convolution must keep the size")
        self._layer(_C.Op.store, x, None, norm=norm, activation=activation, kernel=kernel)

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
        """Every pixel repeated a whole number of times, cropped, plus at most two addends."""
        return self._layer(_C.Op.nearest, x, (x.channels, height, width), add=add)

    def concat(self, x: Value, second: Value) -> Value:
        """The channels of x, then those of second."""
        return self._layer(_C.Op.concat, x, (x.channels + second.channels, x.height, x.width), second=second)

    def embed(self, shape: tuple[int, int, int], patch: int, octaves: Sequence[int], table: Table) -> Value:
        """u = a·x + b of x [*shape], then sin and cos(2ⁿ·π·u) of each octave n, patch×patch pixels as channels.

        table: float64 [levels, 5]: a and b, and what ``store_gradient`` makes the score with.
        """
        channels, height, width = shape
        self.native.embedding(channels, height, width, patch, list(octaves))

        def pack(native=self.native) -> None:
            rows = table.make().detach().double().contiguous()
            native.set_embedding((rows.data_ptr(), rows.numel()))

        self._keep(table.tensors, pack)
        planes = channels * (1 + 2 * len(octaves)) * patch**2
        return self._layer(_C.Op.embed, None, (planes, height // patch, width // patch))

    def store_gradient(self, gradient: Value, embedded: Value) -> None:
        """The network's output: table[:, 2]·∇ᵤ + table[:, 3]·x + table[:, 4], by the gradient of what embed made."""
        self._layer(_C.Op.store_gradient, gradient, None, second=embedded)

    def attention(self, x: Value, channels: int) -> Value:
        """softmax(qᵀk/√channels)·v over the pixels; x: q, k and v, each padded by zeros to a third of its channels."""
        return self._layer(_C.Op.attention, x, (channels, x.height, x.width))

    def slope(self, x: Value, scale: Norm, activation: str) -> Value:
        """γ(level)·activation′(x)."""
        return self._layer(_C.Op.slope, x, x[1:], norm=scale, activation=activation)

    def norm_backward(self, x: Value, gradient: Value, norm: Norm, activation: str, add: Sequence[Value] = ()) -> Value:
        """Gradient in x, given that of activation(norm(x)), plus at most two addends."""
        return self._layer(_C.Op.norm_backward, x, x[1:], second=gradient, add=add, norm=norm, activation=activation)

    def attention_backward(self, x: Value, gradient: Value) -> Value:
        """Gradient in x, given that of attention(x)."""
        return self._layer(_C.Op.attention_backward, x, x[1:], second=gradient)

    def spread(self, x: Value, height: int, width: int) -> Value:
        """x at every second pixel of every second row, zeros between."""
        return self._layer(_C.Op.spread, x, (x.channels, height, width))

    def block_sum(self, x: Value, height: int, width: int, add: Sequence[Value] = ()) -> Value:
        """The transpose of ``nearest``, plus at most two addends."""
        return self._layer(_C.Op.block_sum, x, (x.channels, height, width), add=add)

    def slice(self, x: Value, first: int, channels: int, add: Sequence[Value] = ()) -> Value:
        """Channels first … first + channels − 1, plus at most two addends."""
        return self._layer(_C.Op.slice, x, (channels, x.height, x.width), add=add, first=first)

    def divide_by(self, divisor: Table) -> None:
        """Divide the output by the number [levels, 1] of the level."""

        def pack(native=self.native) -> None:
            values = as_float32(divisor.make())
            native.set_sigmas(given(values))

        self._keep(divisor.tensors, pack)

    def plan(self) -> None:
        """Choose algorithms, lay out memory and pack every weight; no layer can be added after it."""
        self.native.plan()
        self.sync()

    def sync(self, states: Mapping[int, tuple | None] | None = None, force: bool = False) -> int:
        """Pack the weights that changed since the last time, or all; returns how many layers' they were.

        states: id → what the tensor holds, where it has just been looked at.
        """
        states = dict(states or {})
        others = {id(t): t for w in self.weights for t in w.tensors if t is not None and id(t) not in states}
        states |= zip(others, digests(others.values()), strict=True)
        return sum(w.refresh(states, force) for w in self.weights)

    def run(self, x: Tensor, level: Tensor, score: Tensor) -> Tensor:
        """One evaluation of x [B, C, H, W] at level [B] into score; all contiguous, nothing checked but the levels."""
        self.native.run(x.data_ptr(), level.data_ptr(), score.data_ptr(), len(x))
        return score

    def _keep(self, tensors: tuple[Tensor | None, ...], pack: Callable[[], None]) -> None:
        """pack must not hold this graph: in a circle, its memory would wait for the garbage collector."""
        self.weights.append(Packed(tensors, pack))

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
        kernel: Kernel | None = None,
        pool: bool = False,
        scale: float = 1.0,
        shift: float = 0.0,
        first: int = 0,
    ) -> Value | None:
        out = None if shape is None else Value(self.native.tensor(*shape), *shape)
        norm = norm_of(norm) if isinstance(norm, nn.Module) else norm
        self.native.layer(
            op=op,
            input=-1 if x is None else x.id,
            second=-1 if second is None else second.id,
            output=-1 if out is None else out.id,
            add=[a.id for a in add],
            norm=-1 if norm is None else self._norm(norm),
            activation=getattr(_C.Activation, activation),
            conv=-1 if kernel is None else self._conv(kernel, pool),
            scale=scale,
            shift=shift,
            first=first,
        )
        self.layers.append(Layer(op, x, out, second, tuple(add), norm, activation, None if pool else kernel))
        return out

    def _output(self, kernel: Kernel, x: Value, pool: bool = False) -> tuple[int, int]:
        """Height and width of a convolution of x."""
        if pool and (kernel.size, kernel.dilation, kernel.stride, kernel.padding) != (3, 1, 1, 1):
            raise Unsupported("a 2×2 mean after anything but an undilated 3×3 convolution")
        size = (x.height // 2, x.width // 2) if pool else kernel.output(x.height, x.width)
        if min(size) < 1:
            raise Unsupported(f"images of {x.height}×{x.width} are too small for a convolution of them")
        return size

    def _conv(self, k: Kernel, pool: bool) -> int:
        index = self.native.conv(k.c_in, k.c_out, k.size, k.dilation, k.stride, k.padding, pool)
        self.convs.append(index)

        def pack(native=self.native) -> None:
            weight, bias = as_float32(k.weight()), as_float32(k.bias())
            native.set_conv(index, given(weight), given(bias))

        self._keep(k.tensors, pack)
        return index

    def _norm(self, norm: Norm) -> int:
        index = self.native.norm(norm.channels, norm.groups, norm.rows, norm.rows > 1, norm.has_alpha, norm.eps)

        def pack(native=self.native) -> None:
            table = norm.table()
            native.set_norm(index, given(table))

        self._keep(norm.tensors, pack)
        return index
