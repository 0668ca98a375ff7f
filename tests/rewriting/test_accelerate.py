"""``accelerate`` on networks written in plain PyTorch: same outputs, same tensors, the user's object as it was."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.engine.engine import Engine
from sgm_engine.models import NCSN
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.rewriting import norms
from sgm_engine.rewriting.acceleration import Accelerated, accelerate
from sgm_engine.rewriting.recognise import recognise
from sgm_engine.rewriting.rewrite import widened
from tests.rewriting.networks import (
    LEVEL,
    Wrapped,
    X,
    as_on_a_gpu,  # noqa: F401 - fixtures
    network,
    relative,
)


@pytest.fixture(autouse=True)
def same_weights():
    """Norms over few pixels enlarge rounding by what the weights are: those of every run are the same."""
    torch.manual_seed(5)


@pytest.mark.parametrize("conditional", [True, False])
@torch.no_grad()
def test_same_outputs(conditional):
    net = network(conditional)
    fast = accelerate(net, (1, 16, 16))
    expected = copy.deepcopy(net).double()(X.double(), LEVEL)
    ours, plain = relative(fast(X, LEVEL), expected), relative(net(X, LEVEL), expected)
    assert ours <= 2e-6 and ours <= 2 * plain + 2e-7
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


@pytest.mark.parametrize("conditional", [True, False])
@torch.no_grad()
def test_same_outputs_as_on_a_gpu(conditional, as_on_a_gpu):
    net = network(conditional)
    fast = accelerate(net, (1, 16, 16))
    counts = {what: len(where) for what, where in fast.report.replaced.items()}
    assert counts.get("5×5 mean of a norm", 0) == (8 if conditional else 0)
    assert counts.get("elu before the norm, with its sum", 0) == (4 if conditional else 0)
    assert counts["bias of a convolution added by the norm"] >= 10
    assert counts.get("upsampling in 16 bits, for the sum after it", 0) == (1 if conditional else 0)
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


def test_what_is_upsampled_for_a_sum_stays_in_16_bits(as_on_a_gpu, monkeypatch):
    """Whatever autocast would make of it. Not where something else reads it, or where the sum is of two such."""
    fast, seen = accelerate(network(), (1, 16, 16)), []

    def interpolate(x, *args, **kwargs):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return F.interpolate(x, *args, **kwargs)

    monkeypatch.setattr(norms, "F", SimpleNamespace(**(vars(F) | {"interpolate": interpolate})))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = fast(X, LEVEL)
    assert seen == [(torch.bfloat16, False)]
    with torch.no_grad():
        assert relative(y, fast(X, LEVEL)) < 0.1

    def grown(conv, x):
        return F.interpolate(conv(x), size=(32, 32), mode="bilinear")

    def read_twice(layers, x, level):
        up = grown(layers["conv"], x)
        return layers["norm"](up + layers["other"](up))

    def of_two(layers, x, level):
        return layers["norm"](grown(layers["conv"], x) + grown(layers["conv"], 2 * x))

    layers = {"conv": nn.Conv2d(1, 4, 3, padding=1), "other": nn.Conv2d(4, 4, 1), "norm": nn.GroupNorm(2, 4)}
    for run in (read_twice, of_two):
        report = Accelerated(Wrapped(run, **layers).eval()).rewritten(X, LEVEL)[1]
        assert "sum fused into the norm" in report.replaced
        assert not any("upsampling" in what for what in report.replaced)


@pytest.mark.parametrize("conditional", [True, False])
def test_everything_is_replaced_and_reported(conditional):
    report = accelerate(network(conditional), (1, 16, 16)).report
    counts = {what: len(where) for what, where in report.replaced.items()}
    assert counts == {
        "norm": 71 if conditional else 17,
        "norm with elu": 57 if conditional else 17,
        "sum fused into the norm": 31 if conditional else 8,
        "identity upsampling removed": 5,
        "sum from zero removed": 3,
        "convolution and 2×2 mean as one": 1,
        "2×2 mean before a 1×1 convolution": 1,
    }
    assert report.left == {}
    assert "replaced convolution and 2×2 mean as one: 1 (res2.0.conv2.conv)" in str(report)


def test_shares_every_tensor_and_changes_nothing():
    net = network()
    before = pickle.dumps(net)
    fast = accelerate(net, (1, 16, 16))
    with torch.no_grad():
        fast(X, LEVEL)
    assert [id(p) for p in fast.parameters()] == [id(p) for p in net.parameters()]
    assert {p.data_ptr() for p in fast.parameters()} == {p.data_ptr() for p in net.parameters()}
    assert pickle.dumps(net) == before
    assert fast.sigmas is net.sigmas
    fast.train()
    assert not net.training


@torch.no_grad()
def test_any_batch_and_another_size():
    net = network()
    fast = accelerate(net, (1, 16, 16))
    for n in (1, 2, 7, 8):
        x, level = torch.rand(n, 1, 16, 16), torch.randint(10, (n,))
        assert relative(fast(x, level), net(x, level)) <= 2e-6
    x = torch.rand(2, 1, 20, 12)
    assert relative(fast(x, LEVEL[:2]), net(x, LEVEL[:2])) <= 2e-6
    assert len(fast.derived) == 1, "both sizes use one derived kernel"
    lazy = accelerate(net)
    assert lazy.report is None
    assert relative(lazy(X, LEVEL), net(X, LEVEL)) <= 2e-6 and lazy.report is not None


@torch.no_grad()
def test_weights_are_live():
    net = network()
    fast = accelerate(net, (1, 16, 16))
    before, kernel = fast(X, LEVEL), next(iter(fast.derived.values())).kernel
    assert not fast.stale()
    for p in net.parameters():
        p.mul_(1.01)
    assert fast.stale()
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6 < relative(fast(X, LEVEL), before)
    assert not fast.stale()
    net.res2[0].conv2.conv.weight.add_(0.01)
    fast.sync_weights()
    assert not fast.stale() and next(iter(fast.derived.values())).kernel is kernel, "refreshed in place"
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    for module in net.modules():  # every parameter replaced by another object
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(p * 0.9))
    net.sigmas = net.sigmas * 2
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    net.load_state_dict({k: v + 0.01 for k, v in net.state_dict().items()}, assign=True)
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


@torch.no_grad()
def test_a_replaced_buffer_that_the_trace_refers_to():
    net = network(conditional=False)
    fast = accelerate(net, (1, 16, 16))
    net.sigmas = net.sigmas * 2
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


def test_gradients():
    net = network()
    fast = accelerate(net, (1, 16, 16))
    x = X.clone().requires_grad_()
    ours = torch.autograd.grad(fast(x, LEVEL).square().sum(), [x, *net.parameters()])
    theirs = torch.autograd.grad(net(x, LEVEL).square().sum(), [x, *net.parameters()])
    assert relative(torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in theirs])) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("late", [False, True])
def test_a_sum_of_two_precisions_is_one_of_16_bits(late):
    """Traced in float32; under autocast a GPU's interpolation is float32 still, and a convolution is not."""
    norm = recognise(NCSN(torch.logspace(0, -2, 10), 1, 8, image_size=16).normalizer)
    narrow, wide = X.repeat(1, 8, 1, 1).bfloat16(), X.repeat(1, 8, 1, 1) + 1e-3
    x, residual = (wide, narrow) if late else (narrow, wide)
    y, total = norm(x, LEVEL, "elu", residual)
    assert y.dtype == total.dtype == torch.bfloat16 and torch.equal(total, narrow + wide.bfloat16())
    assert torch.equal(y, norm(total, LEVEL, "elu"))


@torch.no_grad()
def test_a_trace_that_comes_late_is_not_made_under_autocast(as_on_a_gpu):
    """Moved to another device, or not traced yet: in 16 bits it would differ from the module, and be refused."""
    net = network()
    fast = accelerate(net, (1, 16, 16))
    fast._built = {(*key[:2], torch.device("meta"), *key[3:]): built for key, built in fast._built.items()}
    engine = Engine(fast, 2, precision="bfloat16", shape=(1, 16, 16), sigmas=net.sigmas, executor="eager")
    plain = Engine(net, 2, precision="bfloat16", shape=(1, 16, 16), sigmas=net.sigmas, executor="eager")
    plan = annealed_langevin(engine.sigmas, 1, step_lr=1e-6)
    assert relative(engine.sample(2, plan=plan), plain.sample(2, plan=plan)) < 1e-2
    for module in (fast, engine._network.forward_module):
        (key,) = module._built  # what was traced for another device is gone
        assert key[2] == torch.device("cpu")
        assert any("sum" in what for what in module.report.replaced)  # traced, not only walked


@torch.no_grad()
def test_bfloat16_and_copies():
    """The engine's cast copy shares the derived kernel; a user's deep copy has one of its own."""
    net = network()
    fast = accelerate(net, (1, 16, 16))
    plan = annealed_langevin(net.sigmas, steps_per_level=1, step_lr=1e-5)
    engine = Engine(fast, batch=2, precision="bfloat16", shape=(1, 16, 16), executor="eager")
    exact = Engine(net, batch=2, shape=(1, 16, 16)).sample(2, plan=plan)
    assert relative(engine.sample(2, plan=plan), exact) < 0.02
    net.res2[0].conv2.conv.weight.mul_(3)
    after = Engine(net, batch=2, shape=(1, 16, 16)).sample(2, plan=plan)
    assert relative(engine.sample(2, plan=plan), after) < 0.02
    assert torch.equal(next(iter(fast.derived.values())).kernel, widened(net.res2[0].conv2.conv.weight))
    other = copy.deepcopy(fast)
    other.source.res2[0].conv2.conv.weight.zero_()
    assert relative(other(X, LEVEL), other.source(X, LEVEL)) <= 2e-6
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


@torch.no_grad()
def test_pickled_it_traces_again(as_on_a_gpu):
    net = network()
    fast = accelerate(net, (1, 16, 16))
    other = pickle.loads(pickle.dumps(fast))
    assert len(fast.derived) and not other.derived and str(other.report) == str(fast.report)
    assert torch.equal(other(X, LEVEL), fast(X, LEVEL)) and len(other.derived) == len(fast.derived)
    other.source.res2[0].conv2.conv.weight.zero_()
    assert relative(other(X, LEVEL), other.source(X, LEVEL)) <= 2e-6
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


@torch.no_grad()
def test_our_own_networks():
    model = NCSN(torch.logspace(0, -2, 10), channels=1, ngf=8, image_size=16)
    fast = accelerate(model)
    assert fast.shape == (1, 16, 16) and len(fast.report.replaced["norm"]) == 71
    assert "convolution and 2×2 mean as one" in fast.report.replaced
    assert relative(fast(X, LEVEL), model(X, LEVEL)) <= 2e-6
