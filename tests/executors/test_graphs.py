"""The graph executor and what an engine makes of it: on a backend that records and replays without a GPU."""

import gc
import warnings

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import CaptureFailed
from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.graphs import WARM_UPS, GraphConfig, GraphExecutor
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Job, Slots, Tables
from sgm_engine.plans.plan import annealed_langevin, consistent_annealed
from tests.executors.graph_engines import (
    PLAN,
    SHAPE,
    SIGMAS,
    _move,
    _replace,
    eager_engine,
    graph_engine,
    small_net,
)
from tests.fake_graphs import FakeGraphs

CPU = torch.device("cpu")


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
