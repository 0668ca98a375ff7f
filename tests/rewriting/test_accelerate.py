"""``accelerate`` on networks written in plain PyTorch: same outputs, same tensors, the user's object as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.engine.engine import Engine
from sgm_engine.models import NCSN
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.rewriting import acceleration
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.recognise import FusedNorm, recognise
from sgm_engine.rewriting.rewrite import widened
from tests.plain_networks import Halved, LevelNorm, Network, Norm


@pytest.fixture(autouse=True)
def fixed_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network(conditional=True, channels=1, ngf=8):
    return Network(torch.logspace(0, -2, 10), channels, ngf, conditional).eval()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


X, LEVEL = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 9, 4])


@pytest.mark.parametrize("conditional", [True, False])
@torch.no_grad()
def test_same_outputs(conditional):
    net = network(conditional)
    fast = accelerate(net, (1, 16, 16))
    expected = copy.deepcopy(net).double()(X.double(), LEVEL)
    ours, plain = relative(fast(X, LEVEL), expected), relative(net(X, LEVEL), expected)
    assert ours <= 2e-6 and ours <= 2 * plain + 2e-7
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Rewrites that pay on a GPU only."""
    monkeypatch.setattr(acceleration, "_is_fused_around", lambda x: True)


@pytest.mark.parametrize("conditional", [True, False])
@torch.no_grad()
def test_same_outputs_as_on_a_gpu(conditional, as_on_a_gpu):
    net = network(conditional)
    fast = accelerate(net, (1, 16, 16))
    counts = {what: len(where) for what, where in fast.report.replaced.items()}
    assert counts.get("5×5 mean of a norm", 0) == (8 if conditional else 0)
    assert counts.get("elu before the norm, with its sum", 0) == (4 if conditional else 0)
    assert relative(fast(X, LEVEL), net(X, LEVEL)) <= 2e-6


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


class Wrapped(nn.Module):
    """A network from a function of (layers, x, level)."""

    def __init__(self, run, **layers):
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), run

    def forward(self, x, level):
        return self.run(self.layers, x, level)


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


class Float32GroupNorm(nn.GroupNorm):
    """As diffusion code often has it."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Halving(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) / 2


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
