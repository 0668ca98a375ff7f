"""The native CPU executor: a whole network, lowered to a flat list of layers that csrc/cpu/executor runs in one call.

``lower`` walks a module of sgm_engine.models and emits its layers into a ``Graph``. What a norm and an activation do to
a layer's input, and what bias, residuals and a pool do to its output, belongs to the layer that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgm_engine import _C
from sgm_engine.models import blocks
from sgm_engine.models.ncsn import RefineNet
from sgm_engine.network import Network
from sgm_engine.slots import Slots, Tables

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


def lower(graph: Graph, model: nn.Module, height: int, width: int) -> None:
    """Emit the layers of ``model`` for images [model.channels, height, width]."""
    if not isinstance(model, RefineNet):
        name = type(model).__name__
        raise Unsupported(f"{name}: the native executor takes NCSN and NCSNv2 networks; use executor='eager'")
    if height % model.size_divisor() or width % model.size_divisor():
        raise ValueError(f"image size must divide by {model.size_divisor()}, got {height}×{width}")
    h = graph.conv(graph.load(model.channels, height, width, 2.0, -1.0), model.begin_conv)
    outputs = {}
    for stage in model.stages:
        for block in model._modules[stage.name]:
            h = _res_block(graph, block, h)
        outputs[stage.name] = h
    for i, refine in enumerate(model.refines):
        skip = outputs[refine.stage]
        h = _refine_block(graph, model._modules[refine.name], [skip, h] if i else [skip])
    graph.store(h, model.end_conv, model.normalizer, "elu")
    if model.divide_by_sigma:
        graph.divide_by(model.sigmas)


def _res_block(graph: Graph, block: blocks.ResBlock, x: Value) -> Value:
    h = graph.conv(x, block.conv1, block.normalize1, "elu")
    if isinstance(block.shortcut, blocks.PoolConv1x1):
        shortcut = graph.conv(graph.mean_pool(x), block.shortcut.conv)
    else:
        shortcut = x if block.shortcut is None else graph.conv(x, block.shortcut)
    pool = isinstance(block.conv2, blocks.ConvMeanPool)
    return graph.conv(h, block.conv2.conv if pool else block.conv2, block.normalize2, "elu", [shortcut], pool)


def _rcu_block(graph: Graph, block: blocks.RCUBlock, x: Value) -> Value:
    for i in range(1, block.blocks + 1):
        h = x
        for j in range(1, block.stages + 1):
            add = [x] if j == block.stages else []
            h = graph.conv(h, block._modules[f"{i}_{j}_conv"], block._modules.get(f"{i}_{j}_norm"), "elu", add)
        x = h
    return x


def _msf_block(graph: Graph, block: blocks.MSFBlock, xs: list[Value]) -> Value:
    norms = block.norms if block.norms is not None else [None] * len(xs)
    total: list[Value] = []
    for x, conv, norm in zip(xs, block.convs, norms, strict=True):
        if (x.height, x.width) == (xs[0].height, xs[0].width):
            total = [graph.conv(x, conv, norm, add=total)]
        else:
            total = [graph.upsample(graph.conv(x, conv, norm), xs[0].height, xs[0].width, add=total)]
    return total[0]


def _crp_block(graph: Graph, block: blocks.CRPBlock, x: Value) -> Value:
    x = path = graph.activate(x, "elu")
    last = len(block.convs) - 1
    for i, conv in enumerate(block.convs):
        norm = None if block.norms is None else block.norms[i]
        pooled = graph.pool5(path, "max" if norm is None else "mean", norm)
        if i == last:  # the sum so far is needed once only, so it is added here
            return graph.conv(pooled, conv, add=[x] if path is x else [x, path])
        if i:
            x = graph.activate(x, "none", add=[path])
        path = graph.conv(pooled, conv)
    return x


def _refine_block(graph: Graph, block: blocks.RefineBlock, xs: list[Value]) -> Value:
    hs = [_rcu_block(graph, adapt, x) for adapt, x in zip(block.adapt_convs, xs, strict=True)]
    h = hs[0] if block.msf is None else _msf_block(graph, block.msf, hs)
    return _rcu_block(graph, block.output_convs, _crp_block(graph, block.crp, h))


class NativeNetwork:
    """``model`` as a callable (x float32 [B, C, H, W], level int64 [B]) → score float32, as x; one native call.

    batch: the number of images that it is tuned for; it takes any. height, width: the only image size it takes.
    precision: "float32", "bfloat16" (convolutions; needs AVX512_BF16), "direct" or "winograd": see PRECISIONS.
    Weights are packed copies: ``sync`` refreshes those whose parameters changed.
    """

    def __init__(self, model: nn.Module, batch: int, height: int, width: int, precision: str = "float32"):
        self.graph = Graph(batch, precision)
        lower(self.graph, model, height, width)
        self.shape = (model.channels, height, width)
        self.graph.plan()

    def sync(self) -> int:
        """Pack the weights that changed since the last time; returns how many layers' they were."""
        return self.graph.sync()

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape or x.dtype != torch.float32 or x.device.type != "cpu":
            shape = ", ".join(map(str, self.shape))
            got = f"{x.dtype} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"x must be float32 [B, {shape}] on the CPU, got {got}")
        if level.shape != x.shape[:1] or level.dtype != torch.int64 or level.device.type != "cpu":
            got = f"{level.dtype} {tuple(level.shape)} on {level.device}"
            raise ValueError(f"level must be int64 [{len(x)}] on the CPU, got {got}")
        x = x.contiguous()
        return self.graph.run(x, level.contiguous(), torch.empty_like(x))


def refusal(model: object, precision: str = "float32") -> str | None:
    """Why the native executor cannot run ``model`` in this precision on this CPU, or None if it can."""
    if not isinstance(model, RefineNet):
        return f"{type(model).__name__} is not an NCSN or NCSNv2 network"
    if precision == "bfloat16" and _C.isa() != "avx512_bf16":
        return f"precision='bfloat16' needs AVX512_BF16, and the instruction set in use is {_C.isa()}"
    return None


class NativeExecutor:
    """Runs chains inside C++: the network, the update and the rows, ``steps`` of them in one call without the GIL.

    Packed weights follow the module's parameters at ``sync_weights``, which the engine calls when one has changed.
    """

    name, captures = "native", 0

    def __init__(self) -> None:
        self.score: Tensor | None = None

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        if reason := refusal(network.model, network.precision):
            raise ValueError(f"executor='native' cannot run this model: {reason}; use executor='eager'")
        if slots.device.type != "cpu":
            raise ValueError(f"executor='native' runs on a CPU, got device {slots.device}: use executor='graph' there")
        self.slots, self.tables = slots, tables
        self.network = NativeNetwork(network.model, slots.batch, *slots.shape[1:], network.precision)
        self.score = torch.zeros(slots.batch, *slots.shape)

    def sync_weights(self) -> None:
        self.network.sync()

    def run(self, steps: int) -> None:
        s, t = self.slots, self.tables
        if s.known is not None:
            for _ in range(steps):
                s.known.impose(s, t)
                self._run(1)
        else:
            self._run(steps)

    def _run(self, steps: int) -> None:
        s, t = self.slots, self.tables
        buffers = {"row": s.row, "stop": s.stop, "seed": s.seed, "sample_id": s.sample_id, "bad_row": s.bad_row}
        tables = {"coef": t.coef, "draw": t.draw, "level": t.level}
        if s.previous is not None:
            buffers |= {"previous": s.previous}
            tables |= {"keep": t.keep}
        if s.gain is not None:
            buffers |= {"gain": s.gain}
            tables |= {"adaptive": t.adaptive}
        self.network.graph.native.run_steps(
            slots=s.batch,
            x=s.x.data_ptr(),
            nhwc=not s.x.is_contiguous(),
            score=self.score.data_ptr(),
            rows=len(t.draw),
            steps=steps,
            **{name: tensor.data_ptr() for name, tensor in (buffers | tables).items()},
        )
