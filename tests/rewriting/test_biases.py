"""Biases of convolutions that norms add, as on a GPU: which, and that they are read where they lie."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.executors.network import Network
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.biases import BiasFree, BiasOf
from sgm_engine.rewriting.rewrite import PooledConv
from sgm_engine.tuning.float8_calibration import calibrate_float8
from tests.rewriting.float8_networks import PLAN, Normed
from tests.rewriting.networks import (
    LEVEL,
    Wrapped,
    X,
    as_on_a_gpu,  # noqa: F401 - fixtures
    fixed_seed,  # noqa: F401
    network,
    relative,
)

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")
FOLDED = "bias of a convolution added by the norm"


def biased(net):
    """With biases that show."""
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and conv.bias is not None:
            nn.init.normal_(conv.bias)
    return net


def rewritten(fast):
    ((graph, *_),) = fast._built.values()
    return list(graph.modules())


@torch.no_grad()
def test_a_network_adds_them_in_its_norms():
    """All but the first convolution's, which two read, and the last's, which no norm follows."""
    net = biased(network())
    fast = accelerate(net, (1, 16, 16))
    parts, every = rewritten(fast), [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    free = [m for m in parts if isinstance(m, BiasFree)]
    pooled = [m for m in parts if isinstance(m, PooledConv)]
    assert len(fast.report.replaced[FOLDED]) == len(free) + len(pooled) == len(every) - 2
    assert pooled and not any(m.biased for m in pooled) and not any("whole network" in why for why in fast.report.left)
    for _ in range(2):
        exact = copy.deepcopy(net).double()(X.double(), LEVEL)
        assert relative(fast(X, LEVEL), exact) <= 2 * relative(net(X, LEVEL), exact) + 2e-7
        for conv in every:  # as an optimizer does
            conv.bias.mul_(-2)
    every[1].bias = nn.Parameter(torch.ones_like(every[1].bias))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


def test_gradients_are_those_of_the_network():
    net = biased(network())
    fast, x = accelerate(net, (1, 16, 16)), X.clone().requires_grad_()
    biases = [m.bias for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    ours, theirs = (torch.autograd.grad(f(x, LEVEL).square().sum(), [x, *biases]) for f in (fast, net))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-4


@torch.no_grad()
def test_a_copy_in_16_bits_shares_them():
    """In float32, of the network itself: a change is seen without a sync. The others are cast, as weights are."""
    net = biased(network())
    held = Network(accelerate(net, (1, 16, 16)), "bfloat16", torch.device("cpu"))
    copied = held.copied()
    theirs = {m.bias.data_ptr() for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    ours = [m.conv.bias for m in rewritten(copied) if isinstance(m, BiasOf)]
    assert {b.data_ptr() for b in ours} < theirs and all(b.dtype == torch.float32 for b in ours)
    assert all(m.conv.weight.dtype == torch.bfloat16 for m in rewritten(copied) if isinstance(m, BiasFree))
    before = held(X, LEVEL)
    assert relative(before, net(X, LEVEL)) < 0.1
    for conv in net.modules():
        if (
            isinstance(conv, nn.Conv2d)
            and conv.bias is not None
            and conv.bias.data_ptr() in {b.data_ptr() for b in ours}
        ):
            conv.bias.mul_(-2)
    assert relative(held(X, LEVEL), net(X, LEVEL)) < 0.1 < relative(before, net(X, LEVEL))


class Small(Normed):
    def forward(self, x, level):
        return self.last(F.elu(self.norm(self.inside(F.elu(self.first(x))))))


@torch.no_grad()
def test_in_float8():
    """A calibration sees the convolution; its layer in 8 bits leaves the bias to the norm too."""
    net = biased(Small().eval())
    fast, x = accelerate(net), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert fast.report.replaced[FOLDED] == ["inside"]
    ours, theirs = (calibrate_float8(m, 2, plan=PLAN, emulate=True) for m in (fast, net))
    assert ours.maxima == pytest.approx(theirs.maxima, rel=0.02) and list(ours.maxima) == ["inside"]
    found, exact = (Network(m, "float8", torch.device("cpu"), float8=ours) for m in (fast, net))
    for sign in (1, -1):
        net.inside.bias.mul_(sign)
        found.sync(), exact.sync()
        assert relative(found(x, LEVEL * 0), exact(x, LEVEL * 0)) < 0.02


def other_reader(m, x, y):
    h = m["conv"](x)
    return m["norm"](h) + h


def other_reader_of_the_upsampled(m, x, y):
    h = F.interpolate(m["conv"](x), size=(32, 32))
    return m["norm"](h + m["other"](h))


def cubic(m, x, y):
    h = m["conv"](x)
    return m["norm"](F.interpolate(h, size=(32, 32), mode="bicubic"))


def named(m, x, y):
    return m["norm"](m["conv"](input=x))


def hooked(m, x, y):
    return m["norm"](m["hooked"](x))


@torch.no_grad()
@pytest.mark.parametrize("run", [other_reader, other_reader_of_the_upsampled, cubic, named, hooked])
def test_what_stays_as_it_is(run):
    layers = {"conv": nn.Conv2d(1, 4, 3, padding=1), "hooked": nn.Conv2d(1, 4, 1), "norm": nn.GroupNorm(2, 4)}
    net = biased(Wrapped(run, **layers, other=nn.Conv2d(4, 4, 1, bias=False))).eval()
    layers["hooked"].register_forward_hook(lambda m, args, y: y * 2)
    fast = accelerate(net, (1, 16, 16))
    assert FOLDED not in fast.report.replaced
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), nn.InstanceNorm2d(4, affine=True)])
def test_what_is_upsampled(norm, mode):
    def run(m, x, y):
        return m["norm"](F.interpolate(m["conv"](x), size=(32, 32), mode=mode) + m["large"](F.interpolate(x, (32, 32))))

    net = biased(Wrapped(run, conv=nn.Conv2d(1, 4, 3), large=nn.Conv2d(1, 4, 1), norm=norm)).eval()
    fast = accelerate(net, (1, 16, 16))
    assert len(fast.report.replaced[FOLDED]) == 2
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
