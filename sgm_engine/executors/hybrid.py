"""The hybrid path: a module that the native executor cannot take whole, on the fused ops and packed convolutions.

Its forward is traced and rewritten as by ``accelerate``; every convolution then holds its weights in the layout that
oneDNN wants, packed once instead of at every call, and activations stay channels_last.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Slots, Tables
from sgm_engine.rewriting.acceleration import Accelerated, refuse_disagreement
from sgm_engine.rewriting.rewrite import Left, PooledConv
from sgm_engine.rewriting.trace import settings, untraceable


class PackedConv(nn.Module):
    """A convolution, or one with its 2×2 mean, by oneDNN with packed weights [opaque]; ``refresh`` packs anew."""

    def __init__(self, source: nn.Conv2d | PooledConv):
        super().__init__()
        self._source = (source,)  # in a tuple: the user's, not registered here
        conv = source._conv[0] if isinstance(source, PooledConv) else source
        self._conv = (conv,)
        self._stride = [2, 2] if isinstance(source, PooledConv) else list(conv.stride)
        self._packed: dict[tuple, Tensor] = {}  # by input size
        self._seen: tuple | None = None

    def refresh(self, states: Mapping[int, tuple | None], force: bool) -> None:
        """Drop what was packed if the weight is another, or ``force``. states: id → what the tensor holds."""
        state = states.get(id(self._conv[0].weight))
        if force or state is None or state != self._seen:
            if isinstance(self._source[0], PooledConv):
                self._source[0].sync()
            self._packed.clear()
            self._seen = state

    def forward(self, x: Tensor) -> Tensor:
        conv, shape = self._conv[0], tuple(x.shape)
        arguments = (list(conv.padding), self._stride, list(conv.dilation), conv.groups)
        if shape not in self._packed:
            kernel = self._source[0].kernel if isinstance(self._source[0], PooledConv) else conv.weight
            self._packed[shape] = torch.ops.mkldnn._reorder_convolution_weight(kernel.detach(), *arguments, list(shape))
        bias = None if conv.bias is None else conv.bias.detach()
        return torch.ops.mkldnn._convolution_pointwise(x, self._packed[shape], bias, *arguments, "none", [], "")


class HybridNetwork(nn.Module):
    """forward(x float32 [B, C, H, W], level int64 [B]) → score, NCHW. Raises Unsupported if it cannot be traced."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int]):
        super().__init__()
        accelerated = model if isinstance(model, Accelerated) else Accelerated(model)
        if reason := untraceable(accelerated.source):
            raise Unsupported(reason)
        x = torch.zeros(1, *shape, dtype=torch.float32, device="cpu")
        level = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._model = (model,)
        self._settings = settings(accelerated.source)
        try:
            with torch.no_grad():
                self.graph, self.report, _ = accelerated.rewritten(x, level)
        except Exception as error:  # whatever the user's forward does that tracing cannot follow
            raise Unsupported(f"its forward cannot be traced ({type(error).__name__}: {str(error)[:120]})") from error
        for name, module in list(self.graph.named_children()):
            if _packs(module):
                setattr(self.graph, name, PackedConv(module))
        self.packed = sum(isinstance(m, PackedConv) for m in self.graph.children())
        try:
            self._layout = torch.channels_last
            refuse_disagreement(self, accelerated.source, x, level)
        except RuntimeError:  # a view that wants another layout
            self._layout = torch.contiguous_format
            refuse_disagreement(self, accelerated.source, x, level)

    def stale(self) -> bool:
        """Whether a number, flag or plain tensor among the module's attributes is another than when it was traced."""
        model = self._model[0]
        return self._settings != settings(model.source if isinstance(model, Accelerated) else model)

    def refresh(self, states: Mapping[int, tuple | None], force: bool = False) -> None:
        """Pack the convolutions that changed anew when they are next called. states: id → what the tensor holds."""
        for module in self.graph.children():
            if isinstance(module, PackedConv):
                module.refresh(states, force)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.graph(x.contiguous(memory_format=self._layout), level).contiguous()

    def describe(self) -> str:
        what = ", ".join(f"{len(where)} {kind}" for kind, where in self.report.replaced.items()) or "nothing"
        return f"{self.packed} packed convolutions; replaced: {what}"


def hybrid_refusal(network: Network) -> str | None:
    """Why the hybrid path cannot run it, or None if it can."""
    if network.precision != "float32":
        return f"precision={network.precision!r}"
    try:
        HybridNetwork(network.module, network.shape)
    except Exception as reason:  # Unsupported, Left, or whatever the user's forward raises at this shape
        return str(reason)
    return None


def _packs(module: nn.Module) -> bool:
    conv = module._conv[0] if isinstance(module, PooledConv) else module
    plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and conv.weight.dtype == torch.float32 and not conv._forward_hooks and not conv._forward_pre_hooks


class HybridExecutor(EagerExecutor):
    """The eager executor over a HybridNetwork. reason: why the native executor cannot, if it was asked."""

    name = "hybrid"

    def __init__(self, reason: str | None = None):
        super().__init__()
        self.reason = reason

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        if slots.device.type != "cpu":
            raise ValueError(f"executor='hybrid' runs on a CPU, got device {slots.device}: use executor='graph' there")
        if network.precision != "float32":
            raise ValueError(f"executor='hybrid' runs in float32, got precision={network.precision!r}")
        if network.module is None:
            raise ValueError("executor='hybrid' needs an nn.Module, got a plain callable: use executor='eager'")
        self.theirs = network
        try:
            self.hybrid = HybridNetwork(network.module, slots.shape)
        except (Unsupported, Left) as reason:
            raise ValueError(f"executor='hybrid' cannot run this model: {reason}; use executor='eager'") from reason
        super().bind(Network(self.hybrid, "float32", network.device), slots, tables)

    def sibling(self) -> HybridExecutor:
        return HybridExecutor(self.reason)

    def sync_weights(self, force: bool = False) -> None:
        self.theirs.sync(force)
        if self.hybrid.stale():
            self.bind(self.theirs, self.slots, self.tables)
        self.hybrid.refresh(self.theirs.watch.states, force)

    def describe(self) -> str:
        return self.hybrid.describe() + (f" (not native: {self.reason})" if self.reason else "")
