"""The engine on a GPU: captures, memory, threads."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import CaptureFailed
from sgm_engine.executors.graphs import WARM_UPS, CudaGraphs, GraphConfig
from sgm_engine.kernels import ops
from tests.executors.gpu_engines import PLAN, SHAPE, SIGMAS, difference, net
from tests.interpreter import run_pretended


def test_buckets_share_one_pool_and_follow_the_weights():
    model = net().cuda()
    engine = Engine(model, 8, buckets=(1, 2), graph=GraphConfig(unroll=4, benchmark=True))
    for _ in range(2):
        for n in (8, 1, 2, 8):
            want = Engine(model, 8, executor="eager").sample(n, 3, PLAN)
            assert difference(engine.sample(n, 3, PLAN), want) < 1e-3
        with torch.no_grad():
            model.end_conv.weight.mul_(0.9)
    assert engine.stats.captures == 3 * 2
    pools = {graph.replay.__self__.pool() for lane in engine._lanes._made.values() for graph in lane.executor._graphs}
    assert len(pools) == 1


def test_a_callback_that_keeps_a_score_does_not_stop_a_new_capture():
    """Its memory keeps the pool of the old graphs in being."""
    model, kept = net().cuda(), []
    engine = Engine(model, 4)
    for _ in range(3):
        engine.sample(4, 3, PLAN, callback=lambda info: kept.append(info.denoised))
        engine.sample(4, 3, PLAN)
        kept.append(engine._executor.score)
        model.end_conv.weight = torch.nn.Parameter(model.end_conv.weight.detach() * 0.9)
    assert engine.stats.captures == 3


def test_a_capture_is_not_spoilt_by_what_is_collected():
    """A graph that only a cycle holds ends when Python collects it, which is a call that a capture does not survive."""
    backend, x, threshold = CudaGraphs(torch.device("cuda", 0)), torch.ones(4, device="cuda"), gc.get_threshold()
    cycle = [backend.capture(lambda: x.mul_(2))]
    cycle.append(cycle)
    graph, alive = weakref.ref(cycle[0].__self__), []

    def step():
        x.add_(1)
        gc.set_threshold(1 if len(alive) == WARM_UPS else 10**6)
        [[] for _ in range(1000)]
        alive.append(graph() is not None)

    try:
        gc.set_threshold(10**6)
        del cycle
        replay = backend.capture(step)
    finally:
        gc.set_threshold(*threshold)
    assert alive == [True] * (WARM_UPS + 1) and gc.isenabled()
    x.zero_()
    replay()
    assert x.tolist() == [1] * 4


def test_a_capture_that_fails_leaves_nothing_behind():
    stream, backend = torch.cuda.current_stream(), CudaGraphs(torch.device("cuda", 0))
    x = torch.ones(4, device="cuda")

    def reads_back():
        if float(x.sum()) > 0:
            x.mul_(1)

    good = backend.capture(lambda: x.add_(1))
    with pytest.raises(CaptureFailed):
        backend.capture(reads_back)
    assert torch.cuda.current_stream() == stream
    assert torch.randn(4, device="cuda").isfinite().all(), "a generator that is still in the capture draws nothing"
    again = backend.capture(lambda: x.add_(1))
    x.zero_()
    good(), again()
    assert x.tolist() == [2] * 4

    model = net().cuda()

    def branches(x, level):
        return model(x, level) if level.max().item() >= 0 else x

    with pytest.warns(UserWarning, match="running eager from now on"):
        found = Engine(branches, 4, "cuda", sigmas=SIGMAS, shape=SHAPE).sample(4, 3, PLAN)
    assert torch.equal(found, Engine(model, 4, executor="eager").sample(4, 3, PLAN))


class Hungry(torch.nn.Module):
    """Asks for more memory than there is at a batch of more than ``most``, in a warm-up or in the capture itself."""

    sigmas, shape = SIGMAS, SHAPE

    def __init__(self, most, in_capture):
        super().__init__()
        self.net, self.most, self.in_capture = net(), most, in_capture

    def forward(self, x, level):
        if len(x) > self.most and torch.cuda.is_current_stream_capturing() == self.in_capture:
            torch.empty(2**50, dtype=torch.uint8, device=x.device)
        return self.net(x, level)


def graphs_alive():
    gc.collect()
    return sum(type(o) is torch.cuda.CUDAGraph for o in gc.get_objects())


@pytest.mark.parametrize("in_capture", [False, True])
def test_out_of_memory_halves_the_batch(in_capture):
    engine = Engine(Hungry(2, in_capture).cuda(), 8)
    before = graphs_alive()
    with pytest.warns(UserWarning, match="out of memory") as warned:
        found = engine.sample(5, 3, PLAN)
    assert graphs_alive() == before + 1, "a graph that is held keeps its memory"
    assert engine.batch == 2 and sum("out of memory" in str(w.message) for w in warned) == 2
    assert engine.executor == "graph"
    assert difference(found, Engine(net(), 2, executor="eager").sample(5, 3, PLAN)) < 1e-4


@pytest.mark.parametrize("side", [False, True])
def test_engines_in_threads(side):
    """Each with a stream of its own, or all on the default one; captures take turns."""
    model = net().cuda()
    engines = [Engine(model, 4, buckets=(2,)) for _ in range(2)]
    want = {n: Engine(model, 4, buckets=(2,)).sample(n, 3, PLAN) for n in (2, 4, 6)}
    torch.cuda.synchronize()

    def wrong(engine):
        with torch.cuda.stream(torch.cuda.Stream()) if side else nullcontext():
            return [n for n in (2, 6, 4) * 2 if not torch.equal(engine.sample(n, 3, PLAN), want[n])]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(wrong, engines * 2)) == [[]] * 4


def test_a_norm_and_its_gradient():
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        t, gamma = x.clone().to(device).requires_grad_(), torch.ones(32, device=device).requires_grad_()
        ops.noise_conditioned_norm(t, gamma, None, None, None, "silu", groups=4).square().sum().backward()
        found.append((t.grad.cpu(), gamma.grad.cpu()))
    assert all(difference(a, b) < 1e-5 for a, b in zip(*found, strict=True))


run_pretended(globals())
