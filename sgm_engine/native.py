"""The native CPU executor: a whole network as a flat list of layers, which csrc/cpu/executor runs in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgm_engine import _C
from sgm_engine.models.ncsn import RefineNet
from sgm_engine.native_graph import Graph
from sgm_engine.native_norm import Unsupported
from sgm_engine.native_refinenet import lower_refinenet
from sgm_engine.network import Network
from sgm_engine.slots import Slots, Tables


def lower(graph: Graph, model: nn.Module, height: int, width: int) -> None:
    """Emit the layers of ``model`` for images [model.channels, height, width]."""
    if not isinstance(model, RefineNet):
        name = type(model).__name__
        raise Unsupported(f"{name}: the native executor takes NCSN and NCSNv2 networks; use executor='eager'")
    lower_refinenet(graph, model, height, width)


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

    def sibling(self) -> NativeExecutor:
        return NativeExecutor()

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
