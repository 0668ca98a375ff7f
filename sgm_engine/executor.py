"""Executors run steps. A step is: look up the levels, call the network, update the state, advance the rows.

An executor is any object with the methods of ``Executor``. It works on buffers that it is handed once (``Slots``,
``Tables``) and never reads anything back to the host: between two calls of ``run`` the engine refills, harvests,
reports and cancels, all from its own mirror of the rows.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sgm_engine.kernels import ops
from sgm_engine.network import Network
from sgm_engine.slots import Slots, Tables

if TYPE_CHECKING:
    from sgm_engine.graphs import GraphConfig


class Executor(Protocol):
    """What an engine asks of an executor: bind, then for each request sync_weights and any number of run.

    name: as in ``Engine(executor=…)`` · captures: graphs captured so far (0 where there is nothing to capture)
    score: the network's output [B, C, H, W] of the last step run, valid until the next ``run``; None before the first
    """

    name: str
    captures: int
    score: Tensor | None

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        """Work on these from now on. The tensors of slots stay; those of tables may be replaced between requests."""

    def sync_weights(self) -> None:
        """Make the next step see the module's current parameters; notice buffers that have moved. Slots may be live."""

    def run(self, steps: int) -> None:
        """Enqueue ``steps`` ≥ 1 steps. At most as many as the nearest live slot has left; idle slots stay untouched."""

    def sibling(self) -> Executor:
        """A new one of the kind, for other slots, that shares with this one what can be shared."""


class EagerExecutor:
    """Calls the network and the update step by step, on any device."""

    name, captures = "eager", 0

    def __init__(self) -> None:
        self.score: Tensor | None = None

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        self.network, self.slots, self.tables = network, slots, tables
        self.level = torch.zeros(slots.batch, dtype=torch.int64, device=slots.device)

    def sync_weights(self) -> None:
        self.network.sync()

    def sibling(self) -> EagerExecutor:
        return EagerExecutor()

    def run(self, steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                self.step()

    def step(self) -> None:
        s, t = self.slots, self.tables
        torch.index_select(t.level, 0, s.row, out=self.level)
        self.score = self.network(s.x, self.level)
        if s.gain is not None:
            s.measure(self.score, t.adaptive)
        keep = None if s.previous is None else t.keep
        slots = (s.row, s.stop, s.seed, s.sample_id, s.bad_row, s.previous)
        known = {} if s.known is None else s.known.arguments(t)
        ops.langevin_update_(s.x, self.score, t.coef, t.draw, *slots, keep, s.gain, **known)


EXECUTORS = ("auto", "eager", "native", "hybrid", "graph")


def make_executor(name: str, network: Network, graph: GraphConfig | None = None) -> Executor:
    """The executor called ``name``. "auto": "graph" on a GPU; on a CPU the first that can of native, hybrid and eager.

    "auto" warns if a network of convolutions is not native on a CPU.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor must be one of {EXECUTORS}, got {name!r}")
    device = network.device
    reason = None  # why it is not native
    if name == "auto":
        name, reason = ("graph", None) if device.type == "cuda" else _best_on_cpu(network)
    if network.precision == "direct" and name != "native":
        why = f"which cannot run this model: {why}" if (why := _native_refusal(network)) else f"not {name!r}"
        raise ValueError(
            f"precision='direct', float32 without Winograd, needs executor='native', {why}; use precision='float32'"
        )
    if name == "graph":
        if device.type != "cuda":
            raise ValueError(
                f"executor='graph' needs a CUDA device, got {device}: use executor='eager' or device='cuda'"
            )
        from sgm_engine.graphs import CudaGraphs, GraphConfig, GraphExecutor

        graph = graph or GraphConfig()
        return GraphExecutor(CudaGraphs(device, graph.benchmark), graph.unroll)
    if graph is not None:
        raise ValueError(f"graph={graph} is for executor='graph', and this engine runs {name!r}: leave it out")
    if name == "native":
        from sgm_engine.native import NativeExecutor

        return NativeExecutor()
    if name == "hybrid":
        from sgm_engine.hybrid import HybridExecutor

        return HybridExecutor(reason)
    return EagerExecutor()


def _best_on_cpu(network: Network) -> tuple[str, str | None]:
    """The name of an executor, and why it is not "native"."""
    reason = _native_refusal(network)
    if reason is None or network.precision == "direct":
        return ("native" if reason is None else "eager"), reason
    name = "eager"
    if network.module is not None and any(isinstance(m, torch.nn.Conv2d) for m in network.module.modules()):
        from sgm_engine.hybrid import hybrid_refusal

        name = "hybrid" if hybrid_refusal(network) is None else "eager"
        warnings.warn(f"executor='native' cannot run this model: {reason}; executor={name!r} runs it", stacklevel=4)
    return name, reason


def _native_refusal(network: Network) -> str | None:
    """Why the native executor cannot run it, None if it can."""
    from sgm_engine.native import refusal

    if network.device.type != "cpu":
        return f"it is on {network.device}"
    return refusal(network.model, network.precision, network.shape, network.levels)
