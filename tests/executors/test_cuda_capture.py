"""The order of calls of a CUDA capture, on stand-ins for PyTorch's streams, events and graphs."""

from contextlib import contextmanager

import pytest
import torch

from sgm_engine.engine.lanes import Turns
from sgm_engine.errors import CaptureFailed
from sgm_engine.executors import graphs
from sgm_engine.executors.graphs import WARM_UPS, CudaGraphs
from tests.executors.graph_engines import (
    PLAN,
    eager_engine,
)


class FakeCuda:
    """What CudaGraphs and Turns call of torch.cuda, noted in order: (what, …)."""

    def __init__(self, monkeypatch):
        self.log, self.now = [], "caller"
        for name in ("stream", "graph", "Event", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {len(self.log)}")
        for call in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, call, lambda *a, call=call: self.log.append((call, *a)), raising=False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))

    def new_stream(self, device, priority):
        assert priority < 0, "it may be one of the user's"
        return Stream(self, "side")

    def current_stream(self, device):
        return Stream(self, self.now)

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        """As torch.cuda.graph, which leaves the stream current, and the pool unusable, when a capture fails."""
        assert graphs._CAPTURING.locked()  # capture synchronises the device, which another one would not survive
        self.log.append(("capture", pool, stream.name, capture_error_mode))
        before, self.now = self.now, stream.name
        yield
        self.now, graph.of = before, pool
        self.log.append(("end",))

    def Event(self):
        return Event(self)


class Graph:
    def __init__(self, cuda):
        self.cuda = cuda

    def pool(self):
        if not hasattr(self, "of"):
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.of

    def replay(self):
        self.cuda.log.append(("replay",))


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.device = cuda, name, torch.device("cuda", 3)

    def wait_stream(self, other):
        self.cuda.log.append((f"{self.name} waits for {other.name}",))

    def wait_event(self, event):
        self.cuda.log.append((f"{self.name} waits for {event.recorded}",))


class Event:
    recorded = None

    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream):
        self.recorded = stream.name


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("set_by_user", [False, True])
def test_the_order_of_a_capture(monkeypatch, chosen, set_by_user):
    """Warm-up and capture on the side stream, which waits for the caller's, which waits for it; cuDNN's choice falls
    before the capture, and its flag is the user's again after it."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", set_by_user)
    cuda = FakeCuda(monkeypatch)
    backend = CudaGraphs(torch.device("cuda"), chosen)
    replay = backend.capture(lambda: cuda.log.append(("step", cuda.now, torch.backends.cudnn.benchmark)))
    flag = chosen or set_by_user
    assert cuda.log == [
        ("side waits for caller",),
        *[("step", "side", flag)] * WARM_UPS,
        ("caller waits for side",),
        ("capture", "pool 0", "side", "thread_local"),
        ("step", "side", flag),
        ("end",),
    ]
    assert torch.backends.cudnn.benchmark is set_by_user and not graphs._CAPTURING.locked()
    replay()
    assert cuda.log[-1] == ("replay",)


@pytest.mark.parametrize(
    "raised, expected",
    [
        (RuntimeError("operation not permitted when stream is capturing"), CaptureFailed),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (ValueError("of the model itself"), ValueError),
    ],
)
@pytest.mark.parametrize("warming_up", [False, True])
def test_a_capture_that_fails(monkeypatch, raised, expected, warming_up):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cuda = FakeCuda(monkeypatch)

    def step():
        if warming_up or cuda.log[-1][0] == "capture":
            raise raised

    with pytest.raises(expected):
        CudaGraphs(torch.device("cuda", 3), True).capture(step)
    ended = [entry for entry in cuda.log if entry[0].startswith("_cuda")]
    wanted = [] if warming_up else [("_cuda_endAllocateToPool", 3, "pool 0"), ("_cuda_releasePool", 3, "pool 0")]
    assert ended == wanted, "the allocator still thinks that a capture is under way"
    ended_well = [entry[0] for entry in cuda.log[-2:]] == ["capture", "end"]
    assert ended_well == (not warming_up), "PyTorch's generator is still in the capture"
    assert torch.backends.cudnn.benchmark is False and not graphs._CAPTURING.locked()


def test_the_pool_is_that_of_graphs_that_are_alive(monkeypatch):
    """Of none that are gone, whose memory a tensor may still hold; and not where a capture has failed."""
    cuda, steps = FakeCuda(monkeypatch), []
    backend = CudaGraphs(torch.device("cuda"))

    def pool_of_capture(step=lambda: None):
        before = len(cuda.log)
        try:
            return backend.capture(step)
        finally:
            steps.append(next(pool for what, pool, *_ in [e for e in cuda.log[before:] if e[0] == "capture"]))

    def fails_in_capture():
        if cuda.log[-1][0] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    first = pool_of_capture()
    second = pool_of_capture()
    shared = first.__self__.pool()
    assert steps[1] == shared and second.__self__.pool() == shared
    with pytest.raises(CaptureFailed):
        pool_of_capture(fails_in_capture)
    assert cuda.now == "caller", "what follows would run on the stream of the capture"
    third = pool_of_capture()
    assert steps[2] == shared and steps[3] == third.__self__.pool() != shared
    del third
    pool_of_capture()
    assert steps[4] not in steps[:4]


def test_a_request_waits_for_the_one_before_on_another_stream(tiny, monkeypatch):
    engine = eager_engine(tiny)
    cuda = FakeCuda(monkeypatch)
    engine._turns = Turns(torch.device("cuda"))
    cuda.now = "one"
    engine.sample(1, plan=PLAN)
    cuda.now = "two"
    stream = engine.stream([0, 1], plan=PLAN)
    next(stream)
    stream.close()
    cuda.now = "three"
    engine.sample(1, plan=PLAN)
    assert cuda.log == [("one waits for None",), ("two waits for one",), ("three waits for two",)]
