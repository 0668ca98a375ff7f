"""Classification diffusion models in the native executor: forward and input gradient against float64 autograd."""

import copy
import ctypes

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine import Engine, ancestral, annealed_langevin, ddim, dpm_solver_2m, heun
from sgm_engine.executors.native.cdm import _ends
from sgm_engine.executors.native.executor import NativeNetwork, refusal
from sgm_engine.executors.native.gradient import append_gradient
from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Norm, Table, Unsupported
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.networks import MLP
from tests.native.test_native import isa, relative_error, threads  # noqa: F401, fixtures

LEVELS = 20


def small(seed=0, **options):
    """A random classifier: every parameter matters."""
    options = {"channels": 1, "image_size": 12, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (6,),
               "schedule": "vp_geometric", "levels": LEVELS, **options}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CDMConfig(**options).build().eval()
        for p in model.parameters():
            if p.dim() == 1:
                nn.init.normal_(p, 0.3, 0.5)
        nn.init.normal_(model.classifier.head.weight, std=0.3)
    return model


def question(model, batch, seed=0):
    """Images as a chain meets them, x [B, C, H, W], at levels that begin with the first and the last."""
    generator = torch.Generator().manual_seed(seed)
    levels = len(model.sigmas)
    level = torch.randint(levels, (batch,), generator=generator)
    level[0], level[-1] = levels - 1, 0
    noise = torch.randn(batch, *model.shape, generator=generator)
    return torch.rand(noise.shape, generator=generator) + model.sigmas[level].view(-1, 1, 1, 1) * noise, level


def score64(model, x, level):
    return copy.deepcopy(model).double()(x.double(), level)


def worst(found, want):
    """The largest relative error of an image."""
    return max(relative_error(f, w) for f, w in zip(found, want, strict=True))


SHAPES = {
    "one resolution": {"multipliers": (1,), "attention": ()},
    "attention at both": {"attention": (12, 6), "width": 32},
    "patches of 2": {"image_size": 20, "patch": 2, "attention": (5,)},
    "fourier": {"fourier": (1, 3, 5, 7)},
    "as cdm_mnist_small": {"image_size": 14, "patch": 2, "fourier": (1, 3, 5, 7), "baseline": (-0.74, 0.62)},
    "odd sizes, three resolutions": {"image_size": 13, "multipliers": (1, 2, 3), "channels": 3, "attention": (7, 4)},
    "down to one pixel": {"image_size": 4, "multipliers": (1, 1, 2), "attention": (1,)},
    "widths off the vector": {"width": 20, "multipliers": (1, 3), "features": 11, "blocks": 2},
}


@pytest.mark.parametrize("name", SHAPES)
def test_score_of_every_shape(name):
    model = small(**SHAPES[name])
    x, level = question(model, 3)
    want = score64(model, x, level)
    network = NativeNetwork(model, 3, *model.shape[1:])
    assert worst(network(x, level), want) < 5e-6
    assert worst(score64(small(1, **SHAPES[name]), x, level), want) > 1e-2  # the weights do matter


@pytest.mark.parametrize("schedule", ["ddpm", "uniform", "flow", "ve_geometric"])
@pytest.mark.parametrize("baseline", [None, (-0.74, 0.62)])
def test_score_of_every_schedule(schedule, baseline):
    model = small(schedule=schedule, baseline=baseline, attention=())
    x, level = question(model, 6)
    assert worst(NativeNetwork(model, 6, 12, 12)(x, level), score64(model, x, level)) < 5e-6


def test_on_every_instruction_set(isa):  # noqa: F811
    model = small(**SHAPES["as cdm_mnist_small"])
    x, level = question(model, 2)
    assert worst(NativeNetwork(model, 2, 14, 14)(x, level), score64(model, x, level)) < 5e-6


def test_other_precisions():
    model = small()
    x, level = question(model, 2)
    want = score64(model, x, level)
    for precision in ("direct", "winograd"):
        assert worst(NativeNetwork(model, 2, 12, 12, precision)(x, level), want) < 5e-6
    assert 1e-4 < worst(NativeNetwork(model, 2, 12, 12, "bfloat16")(x, level), want) < 3e-2


def gradient_of(emit, x, gamma, octaves=(), patch=1):
    """∇ₓ Σ γ_c·silu(out_c) of the layers that ``emit(graph, value)`` builds on what embed makes of x."""
    graph = Graph(len(x), "float32")
    one = torch.tensor([[1.0, 0, 1, 0, 0]], dtype=torch.float64)
    out = emit(graph, graph.embed(x.shape[1:], patch, octaves, Table(lambda: one)))
    scale = Norm(out.channels, 0, 0.0, (Table(lambda: gamma[None, : out.channels]), None, None))
    append_gradient(graph, out, graph.slope(out, scale, "silu"))
    graph.plan()
    return graph.run(x, torch.zeros(len(x), dtype=torch.int64), torch.full_like(x, torch.nan))


def group_norm(channels, groups):
    gamma, beta = (torch.randn(channels) for _ in range(2))
    tables = (Table(lambda: gamma[None]), None, Table(lambda: beta[None]))
    return Norm(channels, groups, 1e-5, tables), lambda x: F.group_norm(x, groups, gamma.double(), beta.double())


def attend(x):
    q, k, v = x.flatten(2).chunk(3, 1)
    weight = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(2)
    return (v @ weight.transpose(1, 2)).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 5)])
def test_gradient_of_each_layer(isa, size):  # noqa: F811
    torch.manual_seed(0)
    x, gamma = torch.randn(2, 6, *size), torch.randn(64)
    convs = {f"{k}, stride {s}": nn.Conv2d(6, 21, k, s, k // 2) for k, s in ((1, 1), (3, 1), (3, 2), (5, 1))}
    own = {name: copy.deepcopy(conv).double() for name, conv in convs.items()}
    cases = {name: (lambda g, v, c=convs[name]: g.conv(v, c), own[name]) for name in convs}
    for groups in (1, 2, 6):
        norm, norm64 = group_norm(6, groups)
        for activation, f in (("silu", F.silu), ("none", lambda y: y)):
            if groups == 6 and size == (1, 1):
                continue  # one number a group: no gradient
            cases[f"norm, {groups} groups, {activation}"] = (
                lambda g, v, n=norm, a=activation: g.conv(v, convs["3, stride 1"], n, a),
                lambda x, n=norm64, f=f: own["3, stride 1"](f(n(x))),
            )
    first, first64, third = convs["1, stride 1"], own["1, stride 1"], convs["3, stride 1"]
    wide, wide64 = group_norm(21, 7)  # groups of 3 lie across vectors
    cases["norm across vectors"] = (
        lambda g, v: g.conv(g.conv(v, first), Kernel.of(last), wide, "silu"),
        lambda x: last64(F.silu(wide64(first64(x)))),
    )
    last = nn.Conv2d(21, 4, 3, padding=1)
    last64 = copy.deepcopy(last).double()
    cropped = tuple(max(2 * n - 1, 1) for n in size)
    cases["nearest"] = (
        lambda g, v: g.nearest(v, *cropped),
        lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : cropped[0], : cropped[1]],
    )
    cases["concat"] = (
        lambda g, v: g.concat(g.conv(v, first), g.conv(v, third, add=[g.conv(v, first)])),
        lambda x: torch.cat([first64(x), own["3, stride 1"](x) + first64(x)], 1),
    )
    cases["attention"] = (
        lambda g, v: g.attention(g.conv(v, Kernel.of(first).split(3, 16)), 7),
        lambda x: attend(first64(x)),
    )
    for name, (emit, f) in cases.items():
        x64 = x.double().requires_grad_()
        out = f(x64)
        want = torch.autograd.grad((F.silu(out) * gamma[: out.shape[1], None, None].double()).sum(), x64)[0]
        assert relative_error(gradient_of(emit, x, gamma), want) < 2e-6, name


def test_waves_at_high_frequencies():
    """sin and cos of 2⁷·π·u hold the digits of u: 1e-6 where float32 arithmetic on the angle loses two."""
    torch.manual_seed(0)
    x, conv = 30 * torch.randn(2, 2, 6, 4), nn.Conv2d(2 * 5 * 4, 8, 1)
    x64, own, gamma = x.double().requires_grad_(), copy.deepcopy(conv).double(), torch.randn(8)
    planes = [x64] + [f(2**n * torch.pi * x64) for n in (0, 7) for f in (torch.sin, torch.cos)]
    out = own(F.pixel_unshuffle(torch.cat(planes, 1), 2))
    want = torch.autograd.grad((F.silu(out) * gamma[:, None, None].double()).sum(), x64)[0]
    assert relative_error(gradient_of(lambda g, v: g.conv(v, conv), x, gamma, (0, 7), 2), want) < 1e-6


def test_bits_depend_on_neither_threads_nor_neighbours(threads):  # noqa: F811
    model = small(**SHAPES["as cdm_mnist_small"], width=32, attention=(7,))
    x, level = question(model, 11)
    network, want = NativeNetwork(model, 11, 14, 14), None
    for n in (1, 2, 3, 5):
        threads(n)
        y = network(x, level)
        want = y if want is None else want
        assert torch.equal(y, want)
        for i in (0, 7):  # alone, so that with several threads a team shares one image
            assert torch.equal(network(x[i : i + 1], level[i : i + 1])[0], want[i])
    assert not torch.equal(network(x, (level + 1) % LEVELS), want)
    alone = []
    for n in (1, 3):  # planned for one thread an image, and for three
        threads(n)
        alone.append(NativeNetwork(model, 1, 14, 14)(x[:1], level[:1]))
    assert torch.equal(*alone)


def test_weights_follow_training():
    model = small(baseline=(0.0, 1.0))
    x, level = question(model, 2)
    network = NativeNetwork(model, 2, 12, 12)
    before = network(x, level)
    assert network.sync() == 0
    with torch.no_grad():
        model.classifier.down[0].conv1.weight.mul_(1.5)
        model.classifier.middle[1].qkv.weight.add_(0.1)
        model.classifier.head.weight.mul_(2)
        model.classifier.norm.bias.add_(0.5)
    assert torch.equal(network(x, level), before)
    assert network.sync() == 7  # each on the way forward and back, the head once
    assert worst(network(x, level), score64(model, x, level)) < 5e-6


PLANS = {
    "ddim": lambda s: ddim(s, start_shift=0.5),
    "ancestral": lambda s: ancestral(s, start_shift=0.5),
    "heun": lambda s: heun(s, start_shift=0.5),
    "dpm": lambda s: dpm_solver_2m(s, start_shift=0.5),
    "langevin": lambda s: annealed_langevin(s, 1, step_lr=1e-7),
}


@pytest.mark.parametrize("name", PLANS)
def test_chains_equal_the_eager_executor(name, threads):  # noqa: F811
    """Five samples in three slots: refilled, so each at its own level. The same noise, twice the distance at most."""
    threads(2)
    model = small(levels=8, baseline=(-0.2, 0.6), fourier=(2,))
    plan = PLANS[name](model.sigmas)
    native, eager = (Engine(model, 3, executor=e).sample(5, seed=7, plan=plan) for e in ("native", "eager"))
    double = copy.deepcopy(model).double()
    exact = Engine(lambda x, t: double(x.double(), t).float(), 3, sigmas=model.sigmas, shape=model.shape)
    want = exact.sample(5, seed=7, plan=plan).double()
    assert relative_error(native, want) <= 2 * relative_error(eager, want) + 1e-6


def test_calls_take_no_memory(threads):  # noqa: F811
    """malloc's own count of what is in use, before and after a thousand steps in one call after another."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [("numbers", ctypes.c_size_t * 10)]  # 4: bytes of maps, 7: of the heap, in use

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    libc.mallinfo2.restype = Mallinfo2

    def in_use():
        found = libc.mallinfo2().numbers
        return found[4] + found[7]

    threads(1)
    model = small()
    x, level = question(model, 2)
    native, score = NativeNetwork(model, 2, 12, 12).graph.native, torch.empty_like(x)
    call = x.data_ptr(), level.data_ptr(), score.data_ptr(), 2
    native.run(*call)
    before = in_use()
    for _ in range(1000):
        native.run(*call)
    assert in_use() - before < 4096


def test_auto_takes_the_native_executor():
    engine = Engine(small(), 2, executor="auto")
    assert engine.sample(1, plan=ddim(engine.sigmas, start_shift=0.5)).isfinite().all()
    assert engine.executor == "native" and "winograd" in engine.describe()


def test_a_nan_is_seen():
    model = small()
    x, level = question(model, 2)
    x[0, 0, 3, 3] = torch.nan
    score = NativeNetwork(model, 2, 12, 12)(x, level)
    assert score[0].isnan().any() and score[1].isfinite().all()


def points():
    classes = small().classes
    return CDM(MLP(2, classes), classes, (2, 1, 1))


def with_term():
    model = small()
    model.classifier.head.register_parameter("other", nn.Parameter(torch.zeros(1)))
    return model


def hooked():
    model = small()
    model.classifier.middle[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (points, "a classifier that is MLP"),
        (with_term, "a head with other terms.* other"),
        (hooked, "classifier.middle.0: it has hooks"),
        (lambda: small().double(), "classifier.begin.weight is torch.float64"),
        (lambda: small(fourier=(31,)), "octave n of 2\\^n must be from 0 to 30, got 31"),
    ],
)
def test_what_it_cannot_run_is_named(make, message):
    model = make()
    assert refusal(model) is not None
    with pytest.raises(ValueError, match=message):
        Engine(model, 1, executor="native")


def test_wrong_use_of_the_layers_is_named():
    model = small()
    network = NativeNetwork(model, 2, 12, 12)
    x, level = question(model, 2)
    for call, message in (
        (lambda: network(x, level + LEVELS), f"level.* must be in \\[0, {LEVELS}\\)"),
        (lambda: network(x[:, :, 1:], level), "x must be float32 \\[B, 1, 12, 12\\]"),
        (lambda: network.graph.native.set_embedding((x.data_ptr(), 5)), "5 numbers a level, as many as before, got 5"),
        (lambda: gradient_of(lambda g, v: g.attention(v, 2), x, torch.ones(9)), "1 heads of 2 channels from 1"),
        (lambda: gradient_of(lambda g, v: g.mean_pool(v), x, torch.ones(9)), "the gradient of the layer mean_pool"),
        (lambda: gradient_of(lambda g, v: g.slice(v, 1, 1), x, torch.ones(9)), "its input has 1 channels"),
    ):
        with pytest.raises((ValueError, IndexError), match=message):
            call()


def unturned(kernel):
    """A transposed kernel whose taps were not turned round."""
    right = TRANSPOSED(kernel)
    return Kernel(right.c_in, right.c_out, right.size, lambda: right.weight().flip(2, 3), right.bias, right.tensors,
                  1, right.padding, right.dilation)  # fmt: skip


TRANSPOSED = Kernel.transposed


def test_planted_defects_are_refused(monkeypatch):
    """A wrong graph does not start: it is compared with the module."""
    model = small()
    monkeypatch.setattr(Kernel, "transposed", unturned)
    with pytest.raises(Unsupported, match="would differ"):
        NativeNetwork(model, 2, 12, 12)
    monkeypatch.undo()
    factor = torch.tensor([1, 1, 1, 1.1, 1])
    monkeypatch.setattr("sgm_engine.executors.native.cdm._ends", lambda m: _ends(m).map(lambda t: t * factor))
    with pytest.raises(Unsupported, match="would differ"):
        NativeNetwork(model, 2, 12, 12)
