"""A network as the native executor's flat list of layers, and its packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgm_engine import _C
from sgm_engine.models import blocks

# "direct" and "winograd" are float32 by one algorithm wherever it applies, "float32" by the cheaper of the two a layer.
PRECISIONS = ("float32", "bfloat16", "direct", "winograd")


class Value(NamedTuple):
    """A tensor of the graph: its index and its shape in one image."""

    id: int
    channels: int
    height: int
    width: int


def _sum(t: Tensor) -> float:
    return t.detach().sum(dtype=torch.float64).item()


@dataclass
class _Weights:
    """Parameters that C++ keeps a packed copy of: how to pack them, and what they were when it last happened."""

    tensors: tuple[Tensor | None, ...]
    pack: Callable[..., None]
    seen: tuple | None = None

    def state(self) -> tuple:
        """Where the parameters are and what they hold: a version does not count what is written through ``.data``."""
        return tuple(None if t is None else (t.data_ptr(), t._version, _sum(t)) for t in self.tensors)

    def refresh(self) -> bool:
        if self.seen == self.state():
            return False
        self.seen = self.state()
        values = [None if t is None else t.detach().to(torch.float32).contiguous() for t in self.tensors]
        self.pack(*(0 if v is None else v.data_ptr() for v in values))
        return True


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
        out = self._value(channels, height, width)
        self._layer(_C.Op.load, None, out, scale=scale, shift=shift)
        return out

    def conv(
        self,
        x: Value,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        activation: str = "none",
        add: Sequence[Value] = (),
        pool: bool = False,
    ) -> Value:
        """conv(activation(norm(x))), its 2×2 mean if ``pool``, plus at most two addends."""
        height, width = (x.height // 2, x.width // 2) if pool else (x.height, x.width)
        out = self._value(conv.out_channels, height, width)
        self._layer(_C.Op.conv, x, out, add=add, norm=norm, activation=activation, conv=self._conv(conv, pool))
        return out

    def store(self, x: Value, conv: nn.Conv2d, norm: nn.Module | None = None, activation: str = "none") -> None:
        """The network's output: conv(activation(norm(x)))."""
        self._layer(_C.Op.store, x, None, norm=norm, activation=activation, conv=self._conv(conv, False))

    def activate(self, x: Value, activation: str, norm: nn.Module | None = None, add: Sequence[Value] = ()) -> Value:
        """activation(norm(x)), plus at most two addends."""
        out = self._value(x.channels, x.height, x.width)
        self._layer(_C.Op.activate, x, out, add=add, norm=norm, activation=activation)
        return out

    def mean_pool(self, x: Value) -> Value:
        """2×2 mean, stride 2."""
        out = self._value(x.channels, x.height // 2, x.width // 2)
        self._layer(_C.Op.mean_pool, x, out)
        return out

    def pool5(self, x: Value, kind: str, norm: nn.Module | None = None) -> Value:
        """5×5 pool of norm(x), stride 1: its "mean", padding counted as zeros, or its "max"."""
        out = self._value(x.channels, x.height, x.width)
        self._layer(_C.Op.mean_pool5 if kind == "mean" else _C.Op.max_pool5, x, out, norm=norm)
        return out

    def upsample(self, x: Value, height: int, width: int, add: Sequence[Value] = ()) -> Value:
        """Bilinear, corners aligned, plus at most two addends."""
        out = self._value(x.channels, height, width)
        self._layer(_C.Op.upsample, x, out, add=add)
        return out

    def divide_by(self, sigmas: Tensor) -> None:
        """Divide the output by sigmas[level]."""
        self._keep((sigmas,), lambda pointer: self.native.set_sigmas(pointer, len(sigmas)))

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

    def _value(self, channels: int, height: int, width: int) -> Value:
        return Value(self.native.tensor(channels, height, width), channels, height, width)

    def _keep(self, tensors: tuple[Tensor | None, ...], pack: Callable[..., None]) -> None:
        self.weights.append(_Weights(tensors, pack))

    def _layer(
        self,
        op,
        x: Value | None,
        out: Value | None,
        *,
        second=None,
        add=(),
        norm=None,
        activation="none",
        conv=-1,
        **affine,
    ):
        self.native.layer(
            op=op,
            input=-1 if x is None else x.id,
            second=-1 if second is None else second.id,
            output=-1 if out is None else out.id,
            add=[a.id for a in add],
            norm=-1 if norm is None else self._norm(norm),
            activation=getattr(_C.Activation, activation),
            conv=conv,
            **{"scale": 1.0, "shift": 0.0, **affine},
        )

    def _conv(self, conv: nn.Conv2d, pool: bool) -> int:
        k, d = conv.kernel_size[0], conv.dilation[0]
        same = conv.kernel_size == (k, k) and conv.dilation == (d, d) and conv.padding == (k // 2 * d,) * 2
        if k not in (1, 3) or not same or conv.stride != (1, 1) or conv.groups != 1 or conv.padding_mode != "zeros":
            raise Unsupported(f"{conv}: only 1×1 and 3×3 convolutions of stride 1 that keep the size, ungrouped")
        index = self.native.conv(conv.in_channels, conv.out_channels, k, d if k > 1 else 1, 1, k // 2 * d, pool)
        self.convs.append(index)
        self._keep((conv.weight, conv.bias), lambda w, b: self.native.set_conv(index, w, b))
        return index

    def _norm(self, norm: nn.Module) -> int:
        native = self.native
        if isinstance(norm, blocks.ConditionalInstanceNormPlus):
            c, levels = norm.channels, norm.embed.num_embeddings
            index = native.norm(c, c, levels, True, True, 1e-5)
            parts = [4 * c * i for i in range(3)]  # bytes from the start of a row to its γ, α and β
            self._keep((norm.embed.weight,), lambda p: native.set_norm(index, *(p + at for at in parts), 3 * c))
        elif isinstance(norm, blocks.InstanceNormPlus):
            index = native.norm(len(norm.gamma), len(norm.gamma), 1, False, True, 1e-5)
            tensors = (norm.gamma, norm.alpha, norm.beta)
            self._keep(tensors, lambda gamma, alpha, beta: native.set_norm(index, gamma, alpha, beta, 0))
        else:
            raise Unsupported(f"{type(norm).__name__}: not a norm that the native executor knows")
        return index


class Unsupported(ValueError):
    """The module holds something that the native executor has no layer for."""
