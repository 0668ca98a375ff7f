"""Whole networks and chains in the native executor, against the originals and the eager executor."""

import copy
import resource

import pytest
import torch
from torch import nn

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.native.executor import NativeExecutor, NativeNetwork
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.watch import Watch, tensors_of
from sgm_engine.models import NCSN
from sgm_engine.plans.plan import annealed_langevin
from tests.models.test_models import GOLDEN, golden
from tests.native.layers import (
    bits_of_any_threads,
    relative_error,
    run_layers,
)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("precision", ["float32", "direct"])
def test_golden(name, precision):
    cls, kwargs = GOLDEN[name]
    model, x, level, want = golden(name, cls, **kwargs)
    network = NativeNetwork(model, len(x), *x.shape[2:], precision)
    assert relative_error(network(x, level), want) < 5e-6


def test_golden_on_every_instruction_set(isa):
    cls, kwargs = GOLDEN["ncsn_28_ngf8"]
    model, x, level, want = golden("ncsn_28_ngf8", cls, **kwargs)
    assert relative_error(NativeNetwork(model, 3, 28, 28)(x, level), want) < 5e-6


def tiny(ngf=4, size=8, channels=1):
    torch.manual_seed(0)
    return NCSN([1.0, 0.3, 0.1], channels, ngf, divide_by_sigma=True, image_size=size).eval()


def network64(model):
    """model in float64; its norms are the plain formula in training mode."""
    double = copy.deepcopy(model).double().train()

    @torch.no_grad()
    def forward(x, level):
        return double(x.double(), level)

    return forward


def test_bits_depend_on_neither_threads_nor_neighbours(threads):
    model = tiny(ngf=20, size=12)
    x, level = torch.rand(11, 1, 12, 12), torch.arange(11) % 3
    network = NativeNetwork(model, 11, 12, 12)
    want = bits_of_any_threads(network, x, level, threads)
    assert not torch.equal(network(x, (level + 1) % 3), want)


@pytest.mark.parametrize("precision", ["float32", "direct"])
def test_bits_do_not_depend_on_the_threads_it_was_planned_for(isa, threads, precision):
    """More threads than images make narrower blocks of output channels, whose statistics must be merged alike."""
    model, x = tiny(ngf=64, size=12), torch.rand(1, 1, 12, 12)
    scores = []
    for n in (1, 2, 8):
        threads(n)
        scores.append(NativeNetwork(model, 1, 12, 12, precision)(x, torch.tensor([1])))
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_sync_packs_what_changed():
    model = tiny()
    x, level = torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
    network = NativeNetwork(model, 2, 8, 8)
    before = network(x, level)
    assert network.sync() == network.sync({}) == 0
    with torch.no_grad():
        model.res1[0].conv1.weight.mul_(1.5)
        model.normalizer.embed.weight.add_(0.1)
    assert torch.equal(network(x, level), before)
    assert network.sync({}) == 2  # tensors of which nothing is said are looked at
    assert relative_error(network(x, level), network64(model)(x, level)) < 5e-6


def test_packing_that_fails_is_done_again():
    """Half of it new, and the weights then as they were: every layer is asked."""
    model = tiny()
    x, level, watch = torch.rand(2, 1, 8, 8), torch.tensor([0, 2]), Watch(model)
    network = NativeNetwork(model, 2, 8, 8)
    assert network.sync(watch.look()) == network.sync(watch.look()) == 0
    want = network(x, level)
    for t in tensors_of(model):
        t.data.mul_(2)
    last = network.graph.weights[-1]
    pack, last.pack = last.pack, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        network.sync(watch.look())
    last.pack = pack
    for t in tensors_of(model):
        t.data.div_(2)
    assert network.sync(watch.look()) > 0
    assert torch.equal(network(x, level), want)


@pytest.mark.parametrize("batch", [1, 3])
def test_chain_equals_the_eager_executor(threads, batch):
    """The same noise: the native chain is at most twice as far from the float64 one as the eager chain is."""
    threads(2)
    model = tiny()
    plan = annealed_langevin(model.sigmas, 3, step_lr=1e-3)
    native = Engine(model, batch, executor="native").sample(5, seed=7, plan=plan)
    eager = Engine(model, batch, executor="eager").sample(5, seed=7, plan=plan)
    network = network64(model)
    exact = Engine(lambda x, level: network(x, level).float(), batch, sigmas=model.sigmas, shape=model.shape)
    want = exact.sample(5, seed=7, plan=plan).double()
    assert relative_error(native, want) <= 2 * relative_error(eager, want) + 1e-6


def test_chain_bits_depend_on_neither_threads_nor_batch(threads):
    model = tiny()
    plan = annealed_langevin(model.sigmas, 2, step_lr=1e-3)
    results = []
    for n, batch in ((1, 4), (2, 4), (3, 2)):
        threads(n)
        results.append(Engine(model, batch, executor="native").sample(5, plan=plan))
    assert torch.equal(results[0], results[1])
    assert relative_error(results[2], results[0].double()) < 1e-5  # another batch may choose other algorithms


def test_idle_slots_stay_untouched_and_bad_tables_are_refused():
    model = tiny()
    engine = Engine(model, 3, executor="native")
    executor, slots, tables = engine._executor, engine._slots, engine._tables
    tables.add(annealed_langevin(model.sigmas, 2, step_lr=1e-3))
    slots.x.fill_(0.5)
    slots.stop[1] = 4
    executor.run(3)
    assert slots.row.tolist() == [0, 3, 0]
    assert torch.all(slots.x[[0, 2]] == 0.5) and not torch.any(slots.x[1] == 0.5)
    slots.stop[2] = 10**6
    slots.row[2] = 10**6 - 1
    with pytest.raises(IndexError, match="slot 2 would run rows"):
        executor.run(1)
    assert slots.row.tolist() == [0, 3, 10**6 - 1]


@pytest.mark.parametrize("batch, workers", [(1, 1), (3, 1), (7, 2)])
def test_memory_stays_flat(threads, batch, workers):
    """Over 2,000 calls, tuned for 3 images: of fewer, of as many, of more."""
    threads(workers)
    network = NativeNetwork(tiny(), 3, 8, 8)
    x, level = torch.rand(batch, 1, 8, 8), torch.arange(batch) % 3
    for _ in range(50):
        network(x, level)
    stated, resident = network.graph.native.bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        network(x, level)
    assert network.graph.native.bytes() == stated
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 400  # KiB; 256 leaked bytes a call are 500


def test_bad_calls():
    model = tiny()
    network = NativeNetwork(model, 2, 8, 8)
    x, level = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    for bad, message in (
        (lambda: network(x.double(), level), "x must be float32"),
        (lambda: network(x[:, :, :6], level), r"\[B, 1, 8, 8\]"),
        (lambda: network(x, level[:1]), "level must be int64"),
        (lambda: NativeNetwork(model, 2, 7, 8), "image size"),
        (lambda: NativeNetwork(model, 2, 8, 8, "half"), "precision must be one of"),
        (lambda: NativeNetwork(nn.Conv2d(1, 1, 3), 2, 8, 8), "Conv2d"),
        (lambda: run_layers(lambda g, v: g.conv(v, nn.Conv2d(1, 1, 9)), x), "up to 7×7"),
        (
            lambda: run_layers(lambda g, v: g.conv(v, nn.Conv2d(1, 1, 3, padding=9, padding_mode="circular")), x),
            "repeats more",
        ),
        (lambda: run_layers(lambda g, v: g.conv(v, nn.Conv2d(3, 3, 3, padding=1)), x), "does not follow"),
        (lambda: run_layers(lambda g, v: g.nearest(v, 12, 9), x), "does not follow"),
        (lambda: run_layers(lambda g, v: g.activate(v, "elu", nn.GroupNorm(2, 4)), x), "4 channels, its input 1"),
        (lambda: run_layers(lambda g, v: g.activate(v, "elu", nn.BatchNorm2d(1)), x), "BatchNorm2d"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(IndexError, match=r"level\[1\] must be in \[0, 3\), got 3"):
        network(x, torch.tensor([0, 3]))
    assert issubclass(Unsupported, ValueError)
    assert NativeExecutor().score is None
