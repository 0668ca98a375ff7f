"""Which norms are recognised by what they do, and what must not be rewritten."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.recognise import FusedNorm, recognise
from tests.plain_networks import LevelNorm, Norm
from tests.rewriting.networks import (
    LEVEL,
    Float32GroupNorm,
    Wrapped,
    X,
    as_on_a_gpu,  # noqa: F401 - fixtures
    relative,
)


class Shuffled(LevelNorm):
    """The same norm with its embedding in another order."""

    def forward(self, x, y):
        g, a, b = self.embed(y).split(self.width, dim=1)
        table = torch.cat([a, b, g], 1)
        inner = LevelNorm.__new__(LevelNorm)
        nn.Module.__init__(inner)
        inner.width, inner.standardise = self.width, self.standardise
        inner.embed = lambda _: table
        return LevelNorm.forward(inner, x, y)


class Loud(LevelNorm):
    def forward(self, x, y):
        return super().forward(x, y) * 1.001


class Whitened(nn.Module):
    """Layer norm over channels, with parameters as InstanceNorm++ has them."""

    def __init__(self, width):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        h = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
        return self.gamma[:, None, None] * h + self.beta[:, None, None]


def test_norms_are_known_by_what_they_do():
    assert recognise(LevelNorm(6, 5)).roles == ("gamma", "alpha", "beta")
    assert recognise(Shuffled(6, 5)).roles == ("beta", "gamma", "alpha")
    assert recognise(Norm(6)).roles == {"gamma": "gamma", "alpha": "alpha", "beta": "beta"}
    assert isinstance(recognise(nn.InstanceNorm2d(4, affine=True, eps=1e-3)), FusedNorm)
    assert recognise(nn.InstanceNorm2d(4, track_running_stats=True)) == "InstanceNorm2d with running statistics"
    for other in (Loud(6, 5), Whitened(6)):
        assert "computes something else" in recognise(other)
    assert recognise(nn.GroupNorm(2, 4)).groups == 2 and recognise(nn.GroupNorm(2, 4, affine=False)).roles == {}
    assert recognise(Float32GroupNorm(2, 4)).groups == 2 and "computes something else" in recognise(Halving(2, 4))
    assert recognise(nn.GroupNorm(2, 4).half()) == "its parameters are not float32"
    assert (
        recognise(nn.Conv2d(1, 1, 1)) is None and recognise(nn.ELU()) is None and recognise(nn.BatchNorm2d(3)) is None
    )
    odd = Norm(6)
    odd.standardise.eps = 1e-2
    assert recognise(odd).eps == 1e-2
    hooked = Norm(6)
    hooked.register_forward_hook(lambda *_: None)
    assert recognise(hooked) == "it has hooks"
    assert recognise(Norm(6).half()) == "its parameters are not float32"


@torch.no_grad()
@pytest.mark.parametrize("make", [LevelNorm, Shuffled, Loud])
def test_each_order_of_an_embedding(make):
    norm = make(4, 10)
    norm.embed.weight.normal_()
    net = Wrapped(lambda m, x, y: F.elu(m["n"](m["c"](x), y)), c=nn.Conv2d(1, 4, 3, padding=1), n=norm)
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    assert fast.report.replaced["norm"] == ["layers.n.standardise" if make is Loud else "layers.n"]
    assert ("computes something else: 1 (layers.n)" in str(fast.report)) == (make is Loud)


@torch.no_grad()
def test_what_must_not_be_rewritten(as_on_a_gpu):
    """Look-alikes: each has the same output, and the report has no such rewrite."""

    def slices(h, *places):
        return sum(h[:, :, i::2, j::2] for i, j in places)

    conv = {"c": nn.Conv2d(1, 4, 3, padding=1), "n": Norm(4)}
    one = {"c": nn.Conv2d(1, 4, 1)}
    cases = [  # (run, layers, what must not have happened)
        (lambda m, x, y: F.elu(m["n"](m["c"](x)), 0.5), conv, "norm with elu"),
        (lambda m, x, y: (lambda h: F.elu(h) + h)(m["n"](m["c"](x))), conv, "norm with elu"),
        (lambda m, x, y: F.leaky_relu(m["n"](m["c"](x))), conv, "norm with"),
        (lambda m, x, y: F.avg_pool2d(m["c"](x), 3, 2), conv, "convolution and"),
        (lambda m, x, y: (lambda h: F.avg_pool2d(h, 2).repeat(1, 1, 2, 2) + h)(m["c"](x)), conv, "convolution and"),
        (lambda m, x, y: slices(m["c"](x), (0, 0), (1, 0), (0, 1), (0, 0)) / 4, conv, "convolution and"),
        (lambda m, x, y: slices(m["c"](x), (0, 0), (1, 0), (0, 1), (1, 1)) / 3, conv, "convolution and"),
        (
            lambda m, x, y: F.avg_pool2d(m["c"](x), 2),
            {"c": nn.Conv2d(1, 4, 3, padding=2, dilation=2)},
            "convolution and",
        ),
        (
            lambda m, x, y: F.avg_pool2d(m["c"](x), 2),
            {"c": nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")},
            "convolution and",
        ),
        (lambda m, x, y: F.avg_pool2d(m["c"](x), 2), {"c": nn.Conv2d(1, 4, 3, stride=2)}, "convolution and"),
        (lambda m, x, y: (lambda h: F.avg_pool2d(h, 2) + h.mean())(m["c"](x)), one, "2×2 mean before"),
        (lambda m, x, y: F.interpolate(m["c"](x), size=(8, 8), mode="bilinear", align_corners=True), conv, "identity"),
        (lambda m, x, y: F.interpolate(m["c"](x), size=(16, 16), mode="bicubic"), conv, "identity"),
        (lambda m, x, y: torch.zeros(x.shape[0], 4, 16, 16) + m["c"](x).mean(1, keepdim=True), conv, "sum from zero"),
        (lambda m, x, y: torch.ones(x.shape[0], 4, 16, 16) + m["c"](x), conv, "sum from zero"),
        (lambda m, x, y: m["n"](m["c"](x) + m["c"](x).mean(1, keepdim=True)), conv, "sum fused"),
        (lambda m, x, y: F.avg_pool2d(m["n"](m["c"](x)), 3, 1, 1), conv, "5×5 mean"),
        (lambda m, x, y: F.avg_pool2d(m["n"](m["c"](x)), 5, 2, 2), conv, "5×5 mean"),
        (lambda m, x, y: F.avg_pool2d(m["n"](m["c"](x)), 5, 1), conv, "5×5 mean"),
        (lambda m, x, y: F.avg_pool2d(m["n"](m["c"](x)), 5, 1, 2, False, False), conv, "5×5 mean"),
        (lambda m, x, y: F.avg_pool2d(m["n"](m["c"](x)), 5, 1, 2, divisor_override=9), conv, "5×5 mean"),
        (lambda m, x, y: F.avg_pool2d(F.elu(m["n"](m["c"](x))), 5, 1, 2), conv, "5×5 mean"),
        (lambda m, x, y: (lambda h: F.avg_pool2d(h, 5, 1, 2) + h)(m["n"](m["c"](x))), conv, "5×5 mean"),
        (lambda m, x, y: F.max_pool2d(m["n"](m["c"](x)), 5, 1, 2), conv, "5×5 mean"),
        (lambda m, x, y: m["n"](F.elu(m["c"](x), 0.5)), conv, "elu before"),
        (lambda m, x, y: m["n"](F.leaky_relu(m["c"](x))), conv, "elu before"),
    ]
    for i, (run, layers, what) in enumerate(cases):
        net = Wrapped(run, **layers).eval()
        fast = accelerate(net, (1, 16, 16))
        assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6, i
        assert not any(key.startswith(what) for key in fast.report.replaced), (i, str(fast.report))


@torch.no_grad()
@pytest.mark.parametrize("act", [F.elu, F.relu, F.silu])
@pytest.mark.parametrize("norm", [Norm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), LevelNorm(4, 10)])
def test_what_stands_round_a_norm(norm, act, as_on_a_gpu):
    """Chained pooling: activation, sum, norm and 5×5 mean in one call, and what is read beside it stays what it was."""
    more = isinstance(norm, LevelNorm)

    def run(m, x, y):
        call = (lambda h: m["n"](h, y)) if more else m["n"]
        h = m["c"](x)
        a = act(h + m["c"](x * x))  # with its sum, which nothing else reads
        b = act(h)  # h is read elsewhere
        return a + m["p"](call(a)) + b + F.avg_pool2d(call(b), 5, stride=1, padding=(2, 2)) + call(act(a + b)) + h

    net = Wrapped(run, c=nn.Conv2d(1, 4, 3, padding=1), n=norm, p=nn.AvgPool2d(5, stride=1, padding=2))
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    name, done = act.__name__, fast.report.replaced
    assert len(done["5×5 mean of a norm"]) == 2 and len(done["norm"]) == 3
    assert len(done[f"{name} before the norm, with its sum"]) == 2 and len(done[f"{name} before the norm"]) == 1


@torch.no_grad()
def test_changes_in_place_that_others_see():
    """The sum is changed after the norm has read it: moving or merging anything here would be wrong."""

    def run(m, x, y):
        h = m["c"](x)
        view = h[:, :2]
        g = m["n"](h)
        h += 1
        view.mul_(2)
        return F.elu(g) + h

    net = Wrapped(run, c=nn.Conv2d(1, 4, 3, padding=1), n=Norm(4))
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    assert "in place" in str(fast.report) and "norm" in fast.report.replaced

    def relu_of_the_sum(m, x, y):
        h = m["c"](x) + m["c"](2 * x)
        g = F.relu_(h)
        return m["n"](h) + g

    net = Wrapped(relu_of_the_sum, c=nn.Conv2d(1, 4, 3, padding=1), n=Norm(4))
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


@torch.no_grad()
def test_what_cannot_be_traced_keeps_its_norms():
    def run(m, x, y):
        h = m["n"](m["c"](x))
        return h if h.sum() > 0 else -h  # depends on a value

    net = Wrapped(run, c=nn.Conv2d(1, 4, 3, padding=1), n=Norm(4))
    fast = accelerate(net, (1, 16, 16))
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6
    assert fast.report.replaced == {"norm": ["layers.n"]} and "between its norms" in str(fast.report)
    assert [id(p) for p in fast.parameters()] == [id(p) for p in net.parameters()]
    net.layers["c"].weight = nn.Parameter(net.layers["c"].weight * 2)
    net.layers["n"].gamma.mul_(3)
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


class Halving(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) / 2
