"""GroupNorm, InstanceNorm and pooled convolutions under ``accelerate``."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.engine.engine import Engine
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.rewriting.acceleration import accelerate
from tests.plain_networks import Halved
from tests.rewriting.networks import LEVEL, Float32GroupNorm, Wrapped, X, network, relative


class GroupNormBlock(nn.Module):
    """norm → SiLU → conv, twice, with a skip: a residual block of a U-Net."""

    def __init__(self, channels, norm=nn.GroupNorm, affine=True):
        super().__init__()
        self.norm1, self.norm2 = norm(4, channels, affine=affine), norm(2, channels, eps=1e-3, affine=affine)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def group_norm_network(**options):
    """Norms for both activations and without one, and one of tokens [N, C, H·W]."""

    def run(m, x, y):
        h = m["block2"](m["block1"](m["conv"](x)))
        h = h + m["tokens"](h.flatten(2)).unflatten(2, x.shape[2:])
        return m["out"](F.elu(m["last"](m["plain"](h))))

    ends = {"conv": nn.Conv2d(1, 8, 3, padding=1), "out": nn.Conv2d(8, 1, 3, padding=1)}
    norms = {name: nn.GroupNorm(groups, 8) for name, groups in (("tokens", 2), ("plain", 8), ("last", 1))}
    net = Wrapped(run, **ends, **norms, block1=GroupNormBlock(8, **options), block2=GroupNormBlock(8, **options))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"norm": Float32GroupNorm}], ids=str)
def test_group_norms(options):
    net = group_norm_network(**options)
    fast = accelerate(net, (1, 16, 16))
    expected = copy.deepcopy(net).double()(X.double(), LEVEL) if "norm" not in options else net(X, LEVEL)
    assert relative(fast(X, LEVEL), expected) <= 2e-6 and relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    assert {p.data_ptr() for p in fast.parameters()} == {p.data_ptr() for p in net.parameters()}
    assert {what: len(where) for what, where in fast.report.replaced.items()} == {
        "norm": 6, "norm with silu": 4, "norm with elu": 1, "sum fused into the norm": 2,
    }  # fmt: skip
    assert fast.report.left == {"a norm of something else than float images [N, C, H, W]": ["layers.tokens"]}
    net.layers["last"].weight.mul_(3)
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    plan = annealed_langevin([1.0, 0.1], steps_per_level=1, step_lr=1e-5)
    engine, plain = (Engine(model, batch=2, sigmas=[1.0, 0.1], shape=(1, 16, 16)) for model in (fast, net))
    assert relative(engine.sample(2, plan=plan), plain.sample(2, plan=plan)) <= 2e-6


@torch.no_grad()
def test_group_norms_where_only_norms_can_be_replaced():
    def run(m, x, y):
        h = m["g"](m["c"](x))
        tokens = m["g"](h.flatten(2)).unflatten(2, h.shape[2:])
        return h if h.sum() > 1e9 else F.silu(tokens + h)

    net = Wrapped(run, c=nn.Conv2d(1, 4, 3), g=nn.GroupNorm(2, 4))
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    assert fast.report.replaced == {"norm": ["layers.g"]} and "between its norms" in str(fast.report)


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ELU(), nn.ReLU(), nn.SiLU(), nn.ReLU(inplace=True), F.relu_, torch.relu])
def test_instance_norm_with_each_activation(activation):
    layers = {"c": nn.Conv2d(1, 4, 3), "n": nn.InstanceNorm2d(4, affine=True)}
    layers |= {"a": activation} if isinstance(activation, nn.Module) else {}
    act = (lambda m: m["a"]) if isinstance(activation, nn.Module) else (lambda m: activation)
    net = Wrapped(lambda m, x, y: act(m)(m["n"](m["c"](x))), **layers).eval()
    net.layers["n"].weight.normal_()
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    assert any(what.startswith("norm with") for what in fast.report.replaced)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@torch.no_grad()
def test_pooled_convolutions(kernel):
    net = Wrapped(lambda m, x, y: m["h"](x), h=Halved(1, 4, kernel))
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    assert len(fast.report.replaced) == 1
    odd = Wrapped(lambda m, x, y: F.avg_pool2d(m["c"](x), 2), c=nn.Conv2d(1, 4, kernel, padding=kernel // 2))
    x = torch.rand(2, 1, 9, 7)
    assert relative(accelerate(odd, (1, 9, 7))(x, LEVEL[:2]), odd(x, LEVEL[:2])) <= 2e-6


def test_bad_arguments():
    with pytest.raises(TypeError, match="module must be an nn"):
        accelerate(lambda x, level: x)
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\)"):
        accelerate(network(), (16, 16))
    net = Wrapped(lambda m, x, y: m["d"](x), d=nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"call module\.eval\(\) first"):
        accelerate(net, (1, 16, 16))
    fast = accelerate(network())
    assert accelerate(fast) is fast
    assert not hasattr(fast, "no_such_thing")
