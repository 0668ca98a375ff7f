"""CUDA graphs: one step is captured, then replayed. What cannot run without a GPU is behind ``GraphBackend``.

A graph is tied to memory: it reads and writes the addresses that its step used. So the executor keeps every tensor that
its graphs read alive for as long as they exist, looks for tensors that have moved whenever the engine asks it to sync,
and drops its old graphs before it captures new ones, so that their memory serves again.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sgm_engine.checks import check_int
from sgm_engine.errors import CaptureFailed, out_of_memory
from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Slots, Tables

WARM_UPS = 3

# Capture synchronises the device, which is forbidden while any other thread of the process captures.
_CAPTURING = threading.Lock()


@dataclass(frozen=True)
class GraphConfig:
    """How executor="graph" captures.

    unroll: steps in one graph, beside the graph of one step that is always there; for steps so short that the launch
        of a graph shows. A request that is watched (callback) runs single steps.
    benchmark: cuDNN times its algorithms before the capture. Two processes may then choose differently, and samples
        differ in the last bits between them: not for jobs that are resumed. False: PyTorch's flag, as it stands.
    """

    unroll: int = 1
    benchmark: bool = False

    def __post_init__(self) -> None:
        check_int("unroll", self.unroll, 1)
        if not isinstance(self.benchmark, bool):
            raise TypeError(f"benchmark must be True or False, got {self.benchmark!r}")


class GraphBackend(Protocol):
    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Warm ``step`` up, record it once, return what replays it and owns the graph; the backend keeps neither.

        CaptureFailed if it cannot be recorded; whatever says out_of_memory() is raised as it is. All graphs of one
        backend share one pool of memory, and so must not be replayed at the same time.
        """


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is collected inside: where a cycle holds another graph, its end is a call that spoils a capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class CudaGraphs:
    """Warm-up and capture on one side stream; the graphs of this backend that are alive draw on one memory pool.

    Replays go to the caller's current stream. Captures of one process take turns.
    """

    def __init__(self, device: torch.device, benchmark: bool = False):
        # Of another priority than a user's: streams are dealt from pools, and after 32 the first comes again.
        self.stream, self.benchmark = torch.cuda.Stream(device, priority=-1), benchmark
        # PyTorch takes the pool of a graph that is alive. One whose graphs are all gone, and one in which a capture
        # failed, it refuses to capture into for as long as a tensor is left there.
        self._sharing: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        with _CAPTURING, self._benchmark():
            try:
                return self._capture(step)
            except (RuntimeError, torch.cuda.CudaError) as error:
                if out_of_memory(error):
                    raise
                raise CaptureFailed(
                    f"the step cannot be captured as a CUDA graph ({error}); use executor='eager'"
                ) from error

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        caller, graph, begun = torch.cuda.current_stream(self.stream.device), torch.cuda.CUDAGraph(), False
        pool = next((other.pool() for other in self._sharing), None) or torch.cuda.graph_pool_handle()
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):  # round the capture too, which does not leave its stream if it fails
            for _ in range(WARM_UPS):
                step()
            caller.wait_stream(self.stream)
            try:
                # Other threads may allocate meanwhile: only this one's calls can spoil the capture.
                with _uncollected(), torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"):
                    begun = True
                    step()
            except BaseException:
                self._sharing.clear()
                if begun:
                    self._abandon(graph, pool)
                raise
        self._sharing.add(graph)
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
        """End for PyTorch's allocator a capture that CUDA has ended. It would think for good that one is under way, and
        run out of memory with memory to free; and the generator would refuse to draw."""
        with suppress(RuntimeError):
            graph.pool()  # its capture has ended well, only the step failed: its memory goes with it
            return
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):  # of a PyTorch that has seen to it
                end(self.stream.device.index, pool)
        self._give_back_generator()

    def _give_back_generator(self) -> None:
        """A capture that fails leaves PyTorch's generator in it, which refuses to draw until another one ends well."""
        with suppress(RuntimeError), torch.cuda.stream(self.stream):
            x = torch.zeros(1, device=self.stream.device)
            graph = torch.cuda.CUDAGraph()
            with (
                _uncollected(),
                torch.cuda.graph(graph, torch.cuda.graph_pool_handle(), self.stream, capture_error_mode="thread_local"),
            ):
                x.add_(1)

    @contextmanager
    def _benchmark(self) -> Iterator[None]:
        """The choice falls in the warm-up, before the capture, which then finds it made."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or self.benchmark
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


class _Graph(NamedTuple):
    """A captured run of ``steps`` steps, and the tensor in which the last one leaves its score."""

    steps: int
    replay: Callable[[], None]
    score: Tensor


class _Kept(NamedTuple):
    """The graphs of one kind of request, and the tensors that only they read."""

    reads: list[Tensor]
    graphs: list[_Graph]


class GraphExecutor(EagerExecutor):
    """Captures one step, and ``unroll`` steps at once if more than 1, and replays them.

    Graphs are kept of a request that samples, and of one that inpaints by each way to redraw. Captures again only when
    a tensor that the graphs read is another than it was, or lies elsewhere.
    """

    name = "graph"

    def __init__(self, backend: GraphBackend, unroll: int = 1):
        super().__init__()
        self.backend, self.unroll, self.captures = backend, unroll, 0
        self._drop()

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        super().bind(network, slots, tables)
        self._drop()

    def sibling(self) -> GraphExecutor:
        return GraphExecutor(self.backend, self.unroll)

    def answer(self, x: Tensor, level: Tensor) -> None:
        """A graph has no answer to other images than the slots'."""

    def sync_weights(self, force: bool = False) -> None:
        self.network.sync(force)
        s, t = self.slots, self.tables
        reads = [*self.network.tensors(), *s.tensors(), *t.tensors()]
        if _places(reads) != _places(self._held):
            self._drop()
        kind = s.known.redraw if s.known else None
        known = list(s.known.arguments(t).values()) if s.known else []
        if kind in self._kept and _places(self._kept[kind].reads) != _places(known):
            del self._kept[kind]
        self._graphs = []
        if kind not in self._kept:
            sizes = (self.unroll, 1) if self.unroll > 1 else (1,)  # the largest first: the others fit into its memory
            graphs = [self._capture(steps) for steps in sizes]
            self._held, self._kept[kind] = reads, _Kept(known, graphs)
            self.captures += len(sizes)
        self._graphs = self._kept[kind].graphs

    def run(self, steps: int) -> None:
        for graph in self._graphs:
            for _ in range(steps // graph.steps):
                graph.replay()
                self.score = graph.score
            steps %= graph.steps

    def _drop(self) -> None:
        """Give up the graphs, and only then what they read."""
        self._graphs: list[_Graph] = []
        self._kept: dict[str | None, _Kept] = {}
        self.score = None
        self._held: list[Tensor] = []

    def _capture(self, steps: int) -> _Graph:
        """Capture with every slot idle, so that warm-up changes nothing, then give the slots their stop back."""

        def run() -> None:
            for _ in range(steps):
                self.step()

        stop = self.slots.stop.clone()
        self.slots.stop.zero_()
        try:
            with torch.no_grad():
                replay = self.backend.capture(run)
        finally:
            self.slots.stop.copy_(stop)
        return _Graph(steps, replay, self.score)


def _places(tensors: list[Tensor]) -> list[tuple]:
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]
