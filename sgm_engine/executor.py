"""Executors run steps. A step is: look up the levels, call the network, update the state, advance the rows.

An executor is any object with the methods of ``Executor``. It works on buffers that it is handed once (``Slots``,
``Tables``) and never reads anything back to the host: between two calls of ``run`` the engine refills, harvests,
reports and cancels, all from its own mirror of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sgm_engine.errors import CaptureFailed
from sgm_engine.kernels import ops
from sgm_engine.network import Network
from sgm_engine.slots import Slots, Tables

WARM_UPS = 3


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

    def run(self, steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                self.step()

    def step(self) -> None:
        s, t = self.slots, self.tables
        if s.known is not None:
            s.known.impose(s, t)
        torch.index_select(t.level, 0, s.row, out=self.level)
        self.score = self.network(s.x, self.level)
        if s.gain is not None:
            s.measure(self.score, t.adaptive)
        keep = None if s.previous is None else t.keep
        slots = (s.row, s.stop, s.seed, s.sample_id, s.bad_row, s.previous)
        ops.langevin_update_(s.x, self.score, t.coef, t.draw, *slots, keep, s.gain)


class GraphBackend(Protocol):
    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Warm ``step`` up, record it once, return what replays it. CaptureFailed if it cannot be recorded."""


class CudaGraphs:
    """Warm-up and capture on one side stream; every graph of this backend draws on one memory pool."""

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # choose before capture
        try:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    step()
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                step()
        except (RuntimeError, torch.cuda.CudaError) as error:
            raise CaptureFailed(
                f"the step cannot be captured as a CUDA graph ({error}); use executor='eager'"
            ) from error
        finally:
            torch.backends.cudnn.benchmark = benchmark
        return graph.replay


class GraphExecutor(EagerExecutor):
    """Captures one step and replays it. Capture again only when a tensor that the graph reads has moved."""

    name = "graph"

    def __init__(self, backend: GraphBackend):
        super().__init__()
        self.backend, self.captures = backend, 0

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        super().bind(network, slots, tables)
        self._held: list[Tensor] = []  # what the graph reads, kept alive for as long as the graph

    def sync_weights(self) -> None:
        self.network.sync()
        s, t = self.slots, self.tables
        reads = [*self.network.tensors(), *s.tensors(), *t.tensors(), *(s.known.tensors(t) if s.known else ())]
        if [r.data_ptr() for r in reads] != [h.data_ptr() for h in self._held]:
            self._held, self._replay = [], None  # the old graph and its memory go first
            self._replay = self._capture()
            self._held = reads
            self.captures += 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._replay()

    def _capture(self) -> Callable[[], None]:
        """Capture with every slot idle, so that warm-up changes nothing, then give the slots their stop back."""
        stop = self.slots.stop.clone()
        self.slots.stop.zero_()
        try:
            with torch.no_grad():
                return self.backend.capture(self.step)
        finally:
            self.slots.stop.copy_(stop)


EXECUTORS = ("auto", "eager", "native", "graph")


def make_executor(name: str, network: Network) -> Executor:
    """The executor called ``name``. "auto": "graph" on a GPU; on a CPU "native" if it can, else "eager"."""
    if name not in EXECUTORS:
        raise ValueError(f"executor must be one of {EXECUTORS}, got {name!r}")
    device = network.device
    if name == "auto":
        name = "graph" if device.type == "cuda" else "eager" if _native_refusal(network) else "native"
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
        return GraphExecutor(CudaGraphs(device))
    if name == "native":
        from sgm_engine.native import NativeExecutor

        return NativeExecutor()
    return EagerExecutor()


def _native_refusal(network: Network) -> str | None:
    """Why the native executor cannot run it, None if it can."""
    from sgm_engine.native import refusal

    if network.device.type != "cpu":
        return f"it is on {network.device}"
    return refusal(network.model, network.precision)
