"""What a native network is built on: its layers' record, its packed weights, and the native executor behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from sgm_engine import _C
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Norm, Table, Unsupported, norm_of
from sgm_engine.executors.native.weights import Packed, as_float32, given
from sgm_engine.kernels.digest import digests
from sgm_engine.pace import paced

# "direct" and "winograd" are float32 by one algorithm wherever it applies, "float32" by the cheaper of the two a layer.
PRECISIONS = ("float32", "bfloat16", "direct", "winograd")

Activation = (
    str | tuple[str, float]
)  # of C++'s enumeration by name; with a number: ("leaky_relu", slope), ("clip", limit)


class Value(NamedTuple):
    """A tensor of the graph: its index and its shape in one image."""

    id: int
    channels: int
    height: int
    width: int


Add = Sequence[Value | tuple[Value, float]]  # at most two addends, each times a number


class Layer(NamedTuple):
    """A layer as it was emitted: what gradient.py goes back through."""

    op: object  # _C.Op
    x: Value | None
    out: Value | None
    second: Value | None
    add: tuple[tuple[Value, float], ...]
    norm: Norm | None
    activation: Activation
    kernel: Kernel | None
    turns: bool = True  # whether its gradient has layers: that of attention, for one head of the usual scale


class Builder:
    """The layers of one network for images of one size, before and after plan()."""

    def __init__(self, batch: int, precision: str):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        self.native = _C.NativeExecutor(batch, getattr(_C.Precision, precision))
        self.weights: list[Packed] = []
        self._settled: Mapping[int, tuple | None] | None = None  # states by which nothing is to be packed
        self.convs: list[int] = []
        self.layers: list[Layer] = []

    def plan(self) -> None:
        """Choose algorithms, lay out memory and pack every weight; no layer can be added after it."""
        self.native.plan()
        self.sync()

    def sync(self, states: Mapping[int, tuple | None] | None = None, force: bool = False) -> int:
        """Pack the weights that changed since the last time, or all; returns how many layers' they were.

        states: id → what the tensor holds, where it has just been looked at.
        """
        if states is not None and states == self._settled and not force:
            return 0
        self._settled, given = None, states  # if one of them fails, the next time asks each again
        states = dict(states or {})
        others = {id(t): t for w in self.weights for t in w.tensors if t is not None and id(t) not in states}
        states |= zip(others, digests(others.values()), strict=True)
        weights = paced(self.weights, len(self.weights), "packing weights", "layers")
        changed = sum(w.refresh(states, force) for w in weights)
        if not others and None not in states.values():
            self._settled = given
        return changed

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
        add: Add = (),
        norm: nn.Module | Norm | None = None,
        activation: Activation = "none",
        kernel: Kernel | None = None,
        pool: bool = False,
        scale: float = 1.0,
        shift: float = 0.0,
        first: int = 0,
        heads: int = -1,
        turns: bool = True,
    ) -> Value | None:
        name, slope = activation if isinstance(activation, tuple) else (activation, 0.0)
        addends = tuple(a if isinstance(a[0], Value) else (a, 1.0) for a in add)
        out = None if shape is None else Value(self.native.tensor(*shape), *shape)
        norm = norm_of(norm) if isinstance(norm, nn.Module) else norm
        self.native.layer(
            op=op,
            input=-1 if x is None else x.id,
            second=-1 if second is None else second.id,
            output=-1 if out is None else out.id,
            add=[(a.id, scale) for a, scale in addends],
            norm=-1 if norm is None else self._norm(norm),
            conv=-1 if kernel is None else self._conv(kernel, pool),
            heads=heads,
            activation=getattr(_C.Activation, name),
            slope=slope,
            scale=scale,
            shift=shift,
            first=first,
        )
        self.layers.append(Layer(op, x, out, second, addends, norm, activation, None if pool else kernel, turns))
        return out

    def _output(self, kernel: Kernel, x: Value, pool: bool = False) -> tuple[int, int]:
        """Height and width of a convolution of x."""
        shape = (kernel.size, kernel.dilation, kernel.stride, kernel.up, kernel.groups, kernel.sides)
        if pool and shape != (3, 1, 1, 1, 1, (1,) * 4):
            raise Unsupported("a 2×2 mean after anything but an ordinary 3×3 convolution")
        size = (x.height // 2, x.width // 2) if pool else kernel.output(x.height, x.width)
        if min(size) < 1:
            raise Unsupported(f"images of {x.height}×{x.width} are too small for a convolution of them")
        return size

    def _conv(self, k: Kernel, pool: bool) -> int:
        border, levels = getattr(_C.Border, k.mode), k.rows if k.rows > 1 else 0
        index = self.native.conv(
            k.c_in, k.c_out, k.size, k.dilation, k.stride, k.up, k.groups, k.sides, border, pool, levels
        )
        self.convs.append(index)

        def pack(native=self.native) -> None:
            weight, bias = as_float32(k.weight()), as_float32(k.bias())
            native.set_conv(index, given(weight), given(bias))

        self._keep(k.tensors, pack)
        return index

    def _norm(self, norm: Norm) -> int:
        levels, by_pixel = norm.rows if norm.rows > 1 else 0, (norm.by_pixel, norm.centred, norm.floor, norm.after)
        source = -1 if norm.source is None else norm.source.id
        index = self.native.norm(norm.channels, norm.groups, levels, norm.has_alpha, norm.eps, *by_pixel, source)
        if norm.source is not None:
            return index

        def pack(native=self.native) -> None:
            table = norm.table()
            native.set_norm(index, given(table))

        self._keep(norm.tensors, pack)
        return index

    def _heads(self, x: Value, channels: int, heads: int, scale: float | None, memory: Table | None) -> int:
        if not 1 <= heads <= channels or channels % heads or x.channels % 3 or 3 * channels > x.channels:
            raise Unsupported(f"{heads} heads of {channels} channels from {x.channels} of q, k and v")
        size = channels // heads
        scale = size**-0.5 if scale is None else scale
        length = 0 if memory is None else memory.make().shape[2]
        index = self.native.heads(heads, size, scale, length)
        if memory is not None:

            def pack(native=self.native) -> None:
                tokens = as_float32(memory.make())
                if tokens.shape != (2, heads, length, size):
                    raise ValueError(f"memory must be [2, {heads}, {length}, {size}], got {list(tokens.shape)}")
                native.set_heads(index, given(tokens))

            self._keep(memory.tensors, pack)
        return index
