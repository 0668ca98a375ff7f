"""Smaller compute batches, and what an engine makes of it when memory runs out."""

import threading
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import EngineError, out_of_memory
from sgm_engine.executors.graphs import GraphExecutor
from sgm_engine.jobs.job import generate
from sgm_engine.plans.samplers import predictor_corrector
from sgm_engine.service.service import SamplerService
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


def _in_place(net):
    with torch.no_grad():
        net.end_conv.weight.mul_(0.5)


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


def test_buckets_inpaint_and_keep_history(tiny):
    known, where = torch.rand(1, 8, 8), torch.rand(1, 8, 8) > 0.5
    engine, plan = graph_engine(tiny, buckets=(2,)), predictor_corrector(SIGMAS)
    for n in (3, 2, 1, 4):
        alone = Engine(tiny, 2 if n <= 2 else 4, executor="eager")
        assert torch.equal(engine.inpaint(known, where, n, 1, PLAN), alone.inpaint(known, where, n, 1, PLAN))
        assert torch.equal(engine.sample(n, 1, plan), alone.sample(n, 1, plan))


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
