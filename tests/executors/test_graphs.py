"""The graph executor and what an engine makes of it: on a backend that records and replays without a GPU."""

import gc
import threading
import warnings
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import nn

from sgm_engine.engine.engine import Engine
from sgm_engine.engine.lanes import Turns
from sgm_engine.errors import CaptureFailed, EngineError, out_of_memory
from sgm_engine.executors import graphs
from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.graphs import WARM_UPS, CudaGraphs, GraphConfig, GraphExecutor
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Job, Slots, Tables
from sgm_engine.jobs.job import generate
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin, consistent_annealed
from sgm_engine.plans.samplers import predictor_corrector
from sgm_engine.plans.schedule import geometric
from sgm_engine.service.service import SamplerService
from tests.fake_graphs import FakeGraphs

CPU = torch.device("cpu")
SIGMAS = geometric(1, 0.1, 3)
SHAPE = (1, 8, 8)
PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)


def small_net(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8, **options).eval()


def graph_engine(model, **options):
    """An engine on the graph executor with a fake backend."""
    engine = eager_engine(model, **options)
    engine._bind(GraphExecutor(FakeGraphs()))
    return engine


def eager_engine(model, batch=4, **options):
    return Engine(model, batch, executor="eager", **options)


class Tiny(nn.Module):
    """A few operations in place of a network."""

    sigmas, shape = SIGMAS, SHAPE

    def __init__(self):
        super().__init__()
        self.end_conv = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.constant_(self.end_conv.weight, -0.1)
        self.end_conv.weight.data[0, 0, 0, 1] = 0.3  # not its own transpose
        self.register_buffer("variance", torch.tensor(SIGMAS, dtype=torch.float32) ** 2)

    def forward(self, x, level):
        return self.end_conv(x) / self.variance[level][:, None, None, None]


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def tiny():
    return Tiny()


# -- one graph ---------------------------------------------------------------------------------------------------------


def test_graph_replays_what_eager_does(net):
    engine = graph_engine(net)
    torch.testing.assert_close(engine.sample(6, 1, PLAN), eager_engine(net).sample(6, 1, PLAN), rtol=0, atol=0)
    assert engine.stats.captures == 1
    assert engine._executor.backend.replays == engine.stats.steps == 2 * PLAN.nfe


def test_the_fake_backend_replays_without_python():
    """The control: the model's Python runs twice to be asked about one image, then in warm-up and capture alone."""
    sigma2 = torch.tensor(SIGMAS, dtype=torch.float32) ** 2
    calls = []

    def model(x, level):
        calls.append(1)
        return -x / sigma2[level][:, None, None, None]

    engine = graph_engine(model, sigmas=SIGMAS, shape=SHAPE)
    engine.sample(1, plan=PLAN)
    engine.sample(1, plan=PLAN)
    assert len(calls) == 2 + WARM_UPS + 1 and engine.stats.captures == 1


def test_one_capture_serves_every_request_and_plan(net):
    engine = graph_engine(net)
    for plan in (PLAN, consistent_annealed(SIGMAS), annealed_langevin(SIGMAS, 3, step_lr=1e-3)):
        engine.sample(3, plan=plan)
    assert engine.stats.captures == 1


def test_weights_changed_in_place_are_seen_without_a_capture(net):
    engine = graph_engine(net)
    before = engine.sample(2, plan=PLAN)
    with torch.no_grad():
        net.end_conv.weight.add_(0.1)
    after = engine.sample(2, plan=PLAN)
    assert engine.stats.captures == 1 and not torch.equal(before, after)
    torch.testing.assert_close(after, eager_engine(net).sample(2, plan=PLAN), rtol=0, atol=0)


def test_an_optimizer_step_counts_from_the_next_request_on(net):
    engine = graph_engine(net, precision="bfloat16")
    before = engine.sample(2, plan=PLAN)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.rand(2, *SHAPE), torch.tensor([0, 1])).square().mean().backward()
    optimizer.step()
    after = engine.sample(2, plan=PLAN)
    assert engine.stats.captures == 1 and not torch.equal(before, after)
    torch.testing.assert_close(after, eager_engine(net, precision="bfloat16").sample(2, plan=PLAN), rtol=0, atol=0)


def _replace(net):
    net.end_conv.weight = nn.Parameter(net.end_conv.weight.detach() * 2)


def _in_place(net):
    with torch.no_grad():
        net.end_conv.weight.mul_(0.5)


def _move(net):
    net.end_conv.weight.data = net.end_conv.weight.data * 2


def _move_norm(net):
    net.normalizer.embed.weight.data = net.normalizer.embed.weight.data * 2


@pytest.mark.parametrize("change", [_replace, _move, _move_norm])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_parameters_replaced_or_moved_are_captured_again(net, change, precision):
    engine = graph_engine(net, precision=precision)
    before = engine.sample(2, plan=PLAN)
    change(net)
    after = engine.sample(2, plan=PLAN)
    assert engine.stats.captures == 2 and not torch.equal(before, after)
    torch.testing.assert_close(after, eager_engine(net, precision=precision).sample(2, plan=PLAN), rtol=0, atol=0)


def test_tables_that_outgrow_their_memory_are_captured_again(net):
    engine = eager_engine(net)
    engine._tables = Tables(CPU, capacity=8)
    engine._bind(GraphExecutor(FakeGraphs()))
    engine.sample(1, plan=PLAN)
    long = annealed_langevin(SIGMAS, 3, step_lr=1e-3)
    rows = engine._tables.add(long)
    assert rows == range(0, long.nfe)
    engine.sample(1, plan=PLAN)
    assert engine.stats.captures == 2


def test_capture_leaves_live_slots_alone(net):
    slots, tables, executor = Slots(4, SHAPE, CPU), Tables(CPU), GraphExecutor(FakeGraphs())
    rows = tables.add(PLAN)
    executor.bind(Network(net, "float32", CPU), slots, tables)
    slots.refill(iter([Job(i, 0, PLAN, rows) for i in range(3)]))
    x, counters = slots.x.clone(), slots.counters.clone()
    executor.sync_weights()
    assert torch.equal(slots.x, x) and torch.equal(slots.counters, counters) and executor.captures == 1
    executor.run(1)
    assert slots.row.tolist() == [1, 1, 1, 0]


def test_a_model_that_cannot_be_captured(net):
    def model(x, level):
        return net(x, level) if level.max().item() >= 0 else x

    explicit = graph_engine(model, sigmas=SIGMAS, shape=SHAPE)
    with pytest.raises(CaptureFailed):
        explicit.sample(2, plan=PLAN)
    engine = graph_engine(model, sigmas=SIGMAS, shape=SHAPE)
    engine._auto = True
    with pytest.warns(UserWarning, match="running eager from now on"):
        first = engine.sample(2, plan=PLAN)
    assert engine.executor == "eager"
    torch.testing.assert_close(first, eager_engine(net).sample(2, plan=PLAN), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        engine.sample(2, plan=PLAN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs are not run")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_graph(precision):
    net = small_net().cuda()
    graph, eager = (Engine(net, 4, precision=precision, executor=name) for name in ("graph", "eager"))
    assert graph.executor == "graph"
    torch.testing.assert_close(graph.sample(6, plan=PLAN), eager.sample(6, plan=PLAN), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        net.end_conv.weight.mul_(2)
    torch.testing.assert_close(graph.sample(6, plan=PLAN), eager.sample(6, plan=PLAN), rtol=2e-2, atol=2e-2)
    assert graph.stats.captures == 1


def test_memory_read_in_another_layout_is_captured_again(tiny):
    """The same address, the same numbers, other strides: the graph would read them transposed."""
    engine = graph_engine(tiny)
    before = engine.sample(2, plan=PLAN)
    tiny.end_conv.weight.data = tiny.end_conv.weight.data.transpose(2, 3)
    after = engine.sample(2, plan=PLAN)
    assert engine.stats.captures == 2 and not torch.equal(before, after)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_old_graphs_go_before_new_ones_are_captured(tiny):
    engine = graph_engine(tiny)
    backend = engine._executor.backend
    for turn in range(3):
        engine.sample(2, plan=PLAN)
        _move(tiny)
        assert engine.stats.captures == turn + 1 and backend.alive == backend.peak == 1
    engine._executor.bind(engine._network, engine._slots, engine._tables)
    assert backend.alive == 0  # bound to something else, it keeps no graph of what it was bound to before


def test_a_graph_goes_with_its_engine_at_once(tiny):
    """By reference counts: memory of a GPU cannot wait for the garbage collector."""
    engine = graph_engine(tiny, buckets=(2,))
    backend = engine._executor.backend
    for n in (2, 4):
        engine.sample(n, plan=PLAN)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert backend.alive == 0
    finally:
        gc.enable()


def test_what_a_graph_reads_lives_as_long_as_it(tiny):
    """Weights that were moved: the executor is their last owner, and lets go of them when it drops the graph."""
    engine = graph_engine(tiny)
    engine.sample(2, plan=PLAN)
    executor, old = engine._executor, tiny.end_conv.weight.data_ptr()
    _move(tiny)
    assert [h.data_ptr() for h in executor._held].count(old) == 1
    engine.sample(2, plan=PLAN)
    assert old not in [h.data_ptr() for h in executor._held]


# -- several steps in one graph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [2, 3, 50])
def test_several_steps_in_one_graph(tiny, unroll):
    engine, backend = eager_engine(tiny), FakeGraphs()
    engine._bind(GraphExecutor(backend, unroll))
    want = eager_engine(tiny).sample(6, 1, PLAN)
    assert torch.equal(engine.sample(6, 1, PLAN), want)
    assert backend.captured == [(4, unroll), (4, 1)] and engine.stats.captures == 2
    assert backend.replays == 2 * (PLAN.nfe // unroll + PLAN.nfe % unroll)
    seen = []
    watched = engine.sample(6, 1, PLAN, callback=lambda info: seen.append(info.denoised.clone()))
    assert torch.equal(watched, want) and len(seen) == 2 * PLAN.nfe
    expected = []
    eager_engine(tiny).sample(6, 1, PLAN, callback=lambda info: expected.append(info.denoised.clone()))
    assert all(map(torch.equal, seen, expected))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_the_score_is_that_of_the_last_step_run(tiny, k):
    scores = []
    for executor in (GraphExecutor(FakeGraphs(), 3), EagerExecutor()):
        slots, tables = Slots(4, SHAPE, CPU), Tables(CPU)
        executor.bind(Network(tiny, "float32", CPU), slots, tables)
        rows = tables.add(PLAN)
        slots.refill(iter([Job(i, 0, PLAN, rows) for i in range(4)]))
        executor.sync_weights()
        executor.run(k)
        scores.append(executor.score.clone())
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"unroll": 0}, ValueError, "unroll must be at least 1, got 0"),
        ({"unroll": 1.5}, TypeError, "unroll must be an integer, got 1.5"),
        ({"benchmark": 1}, TypeError, "benchmark must be True or False, got 1"),
    ],
)
def test_bad_settings(wrong, error, message):
    with pytest.raises(error, match=message):
        GraphConfig(**wrong)


def test_settings_of_graphs_are_refused_where_there_are_none(tiny):
    with pytest.raises(ValueError, match=r"graph=GraphConfig\(.*is for executor='graph', and this engine runs 'eager'"):
        Engine(tiny, executor="eager", graph=GraphConfig())


# -- buckets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["eager", "graph", "native"])
def test_a_request_runs_in_the_smallest_bucket_that_holds_it(tiny, executor):
    """Its bits are those of an engine of that batch, whatever ran before; a stream's are those of the full batch."""
    name, model = ("native", small_net()) if executor == "native" else ("eager", tiny)
    engine = Engine(model, 8, executor=name, buckets=[4, 2, 4])
    assert engine.batch == 8 and engine.buckets == (2, 4)
    if executor == "graph":
        engine._bind(GraphExecutor(FakeGraphs()))
    of_batch = {b: Engine(model, b, executor=name).sample(20, 3, PLAN) for b in (2, 4, 8)}
    for n, batch in ((3, 4), (1, 2), (20, 8), (4, 4), (2, 2), (5, 8), (3, 4)):
        before = engine.stats.steps
        assert torch.equal(engine.sample(n, 3, PLAN), of_batch[batch][:n]), n
        assert engine.stats.steps - before == PLAN.nfe * -(-n // batch)
        assert engine._slots.batch == batch and not engine._slots.live
    streamed = [x for _, x in engine.stream(range(3), 3, PLAN)]
    assert all(map(torch.equal, streamed, of_batch[8])) and engine._slots.batch == 8
    if executor == "graph":
        backend = engine._executor.backend
        assert sorted(backend.captured) == [(2, 1), (4, 1), (8, 1)] and backend.alive == engine.stats.captures == 3


def test_every_bucket_follows_the_weights(tiny):
    engine = graph_engine(tiny, buckets=(2,))
    for change in (None, _in_place, _replace, _move):
        if change:
            change(tiny)
        for n in (4, 2, 4):
            want = Engine(tiny, 2 if n == 2 else 4, executor="eager").sample(n, 0, PLAN)
            assert torch.equal(engine.sample(n, 0, PLAN), want), (change, n)
    assert engine.stats.captures == 2 * 3  # once, and for the weights that were replaced and moved


def test_every_bucket_of_the_native_executor_follows_replaced_weights():
    net = small_net()
    engine = Engine(net, 4, executor="native", buckets=(2,))
    for _ in range(2):
        for n in (4, 2):
            torch.testing.assert_close(
                engine.sample(n, 0, PLAN), eager_engine(net).sample(n, 0, PLAN), rtol=1e-4, atol=1e-4
            )
        _replace(net)


def test_buckets_inpaint_and_keep_history(tiny):
    known, where = torch.rand(1, 8, 8), torch.rand(1, 8, 8) > 0.5
    engine, plan = graph_engine(tiny, buckets=(2,)), predictor_corrector(SIGMAS)
    for n in (3, 2, 1, 4):
        alone = Engine(tiny, 2 if n <= 2 else 4, executor="eager")
        assert torch.equal(engine.inpaint(known, where, n, 1, PLAN), alone.inpaint(known, where, n, 1, PLAN))
        assert torch.equal(engine.sample(n, 1, plan), alone.sample(n, 1, plan))


def test_turns_of_sampling_and_inpainting_capture_once_each(tiny):
    """And both again when a weight moves, one at a time in memory."""
    known, where = torch.rand(1, 8, 8), torch.rand(1, 8, 8) > 0.5
    engine, alone = graph_engine(tiny), Engine(tiny, 4, executor="eager")
    backend = engine._executor.backend
    for moved in range(2):
        for _ in range(3):
            assert torch.equal(engine.sample(3, 1, PLAN), alone.sample(3, 1, PLAN))
            for redraw in ("level", "step"):
                how = (known, where, 3, 1, PLAN)
                assert torch.equal(engine.inpaint(*how, redraw=redraw), alone.inpaint(*how, redraw=redraw))
        assert engine.stats.captures == 3 * (moved + 1) and backend.alive == backend.peak == 3
        _move(tiny)


@pytest.mark.parametrize(
    "buckets, error, message",
    [
        ([0], ValueError, "buckets must be at least 1, got 0"),
        ([16], ValueError, "buckets must be at most batch = 4, got 16"),
        (3, TypeError, "buckets must be a list of batch sizes, got 3"),
        ([1.5], TypeError, "buckets must be an integer, got 1.5"),
    ],
)
def test_bad_buckets(tiny, buckets, error, message):
    with pytest.raises(error, match=message):
        Engine(tiny, 4, buckets=buckets)


def test_a_service_takes_no_buckets(tiny):
    with pytest.raises(ValueError, match=r"engine must have no buckets, got \(2,\)"):
        SamplerService(Engine(tiny, 4, buckets=(2,)))


# -- out of memory, and what cannot be captured ------------------------------------------------------------------------


class Limited(nn.Module):
    """A network with memory for ``most`` images at once, as a GPU says it: within another error, or not."""

    def __init__(self, net, most, after=0, wrapped=False):
        super().__init__()
        self.net, self.most, self.after, self.wrapped = net, most, after, wrapped

    def forward(self, x, level):
        self.after -= 1
        if len(x) > self.most and self.after < 0:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            except RuntimeError as error:
                if self.wrapped:
                    raise RuntimeError("the capture was invalidated") from error
                raise
        return self.net(x, level)


@pytest.mark.parametrize("executor", ["eager", "graph"])
@pytest.mark.parametrize("most, halvings", [(8, 1), (3, 3), (1, 4)])
def test_out_of_memory_halves_the_batch_and_says_so_once(tiny, executor, most, halvings):
    engine = Engine(Limited(tiny, most, wrapped=most == 3), 16, executor="eager", sigmas=SIGMAS, shape=SHAPE)
    if executor == "graph":
        engine._bind(GraphExecutor(FakeGraphs()))
    with pytest.warns(UserWarning) as warned:
        got = engine.sample(20, 3, PLAN)
    sizes = [16 >> k for k in range(halvings + 1)]
    assert [str(w.message) for w in warned] == [
        f"out of memory at batch {was}; running with batch {now} from now on" for was, now in pairwise(sizes)
    ]
    assert engine.batch == sizes[-1]
    assert torch.equal(got, Engine(tiny, sizes[-1], executor="eager").sample(20, 3, PLAN))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert torch.equal(engine.sample(20, 3, PLAN), got)
    if executor == "graph":
        assert engine._executor.backend.alive == 1


@pytest.mark.parametrize("known", [False, True])
def test_out_of_memory_in_the_middle_of_a_stream_loses_nothing(tiny, known):
    """Samples that are out already stay; those that ran start anew in fewer slots, and keep their order and bits."""
    model = Limited(tiny, 2, after=PLAN.nfe + 3)
    engine = Engine(model, 4, executor="eager", sigmas=SIGMAS, shape=SHAPE)
    kept, where = torch.rand(1, 8, 8), torch.rand(1, 8, 8) > 0.5
    with pytest.warns(UserWarning, match="out of memory at batch 4; running with batch 2 from now on"):
        if known:
            got = list(enumerate(engine.inpaint(kept, where, 10, 3, PLAN)))
        else:
            got = list(engine.stream(range(10), 3, PLAN))
    assert [i for i, _ in got] == list(range(10)) and engine.batch == 2

    def alone(batch):
        e = Engine(tiny, batch, executor="eager")
        return e.inpaint(kept, where, 10, 3, PLAN) if known else e.sample(10, 3, PLAN)

    four, two = alone(4), alone(2)
    assert all(torch.equal(x, (four if i < 4 else two)[i]) for i, x in got)


def test_out_of_memory_for_one_image_is_raised(tiny):
    engine = Engine(Limited(tiny, 0), 2, executor="eager", sigmas=SIGMAS, shape=SHAPE)
    with pytest.warns(UserWarning, match="batch 1 from now on"), pytest.raises(torch.OutOfMemoryError):
        engine.sample(2, plan=PLAN)


def test_another_error_does_not_halve_the_batch(tiny):
    def model(x, level):
        raise RuntimeError("shapes do not match")

    engine = Engine(model, 4, executor="eager", sigmas=SIGMAS, shape=SHAPE)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine.sample(2, plan=PLAN)
    assert engine.batch == 4


def test_halving_frees_what_was_larger(tiny):
    """A bucket of 4 that does not fit: the batch of 8 goes as well, and 2 is the largest that is left."""
    model = Limited(tiny, 100)
    engine = graph_engine(model, buckets=(2, 4), batch=8, sigmas=SIGMAS, shape=SHAPE)
    backend = engine._executor.backend
    for n in (8, 1, 4):
        engine.sample(n, plan=PLAN)
    model.most = 2
    _move(tiny)
    with pytest.warns(UserWarning, match="out of memory at batch 4; running with batch 2 from now on"):
        got = engine.sample(4, plan=PLAN)
    assert engine.batch == 2 and engine.buckets == () and backend.alive == 1
    assert torch.equal(got, Engine(tiny, 2, executor="eager").sample(4, plan=PLAN))


def test_a_job_does_not_go_on_with_another_batch(tiny, tmp_path):
    """Its shards would not be what a resumed job draws."""
    model = Limited(tiny, 2)
    model.sigmas, model.shape = SIGMAS, SHAPE
    engine = Engine(model, 4, executor="eager")
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(EngineError, match="batch"):
        generate(engine, tmp_path / "job", 8, plan=PLAN, shard_size=4)


@pytest.mark.parametrize("inner", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("std::bad_alloc"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_errors_that_say_out_of_memory(inner):
    assert out_of_memory(inner)
    try:
        try:
            raise inner
        finally:
            raise ValueError("while it was cleaned up")
    except ValueError as outer:
        assert out_of_memory(outer)
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_every_bucket_goes_eager_when_one_cannot_be_captured(tiny):
    def model(x, level):
        return tiny(x, level) if level.max().item() >= 0 else x

    engine = graph_engine(model, buckets=(2,), sigmas=SIGMAS, shape=SHAPE)
    engine._auto = True
    with pytest.warns(UserWarning) as warned:
        got = [engine.sample(n, 3, PLAN) for n in (2, 4, 1)]
    assert len(warned) == 1 and engine.executor == "eager" and engine.stats.captures == 0
    for n, x in zip((2, 4, 1), got, strict=True):
        assert torch.equal(x, Engine(tiny, 4 if n > 2 else 2, executor="eager").sample(n, 3, PLAN))


# -- threads, streams, and the calls of torch.cuda ---------------------------------------------------------------------


def test_two_engines_in_two_threads(tiny):
    engines = [graph_engine(tiny, buckets=(2,)) for _ in range(2)]
    want = {n: Engine(tiny, 2 if n <= 2 else 4, executor="eager").sample(n, 3, PLAN) for n in (1, 2, 3, 6)}
    wrong = []

    def caller(engine, order):
        for n in order * 3:
            if not torch.equal(engine.sample(n, 3, PLAN), want[n]):
                wrong.append(n)

    orders = [(1, 6, 2, 3), (3, 2, 6, 1)]
    threads = [threading.Thread(target=caller, args=(e, o)) for e in engines for o in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and [e.stats.captures for e in engines] == [2, 2]


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
