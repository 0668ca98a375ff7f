"""Any module on the native executor: lowered from its trace, against float64; what it cannot take runs hybrid."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.native.executor import NativeNetwork, Unsupported, refusal
from sgm_engine.models.guidance import with_drift
from sgm_engine.models.score_model import as_score
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.rewriting.acceleration import accelerate
from tests.native.layers import relative_error
from tests.native.test_native_networks import network64
from tests.plain_networks import Network

SIGMAS = torch.tensor([1.0, 0.5, 0.2, 0.1])


class Residual(nn.Module):
    """A DDPM block: twice GroupNorm → SiLU → conv, an embedding of the time added between, plus a shortcut."""

    def __init__(self, a, b, embedding):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, a), nn.GroupNorm(4, b)
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.time = nn.Linear(embedding, b)
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Strided convolution down, nearest up, concatenation, a sinusoidal embedding; a gate if asked for."""

    shape = (3, 8, 8)

    def __init__(self, width=12, gated=False):
        super().__init__()
        self.register_buffer("sigmas", SIGMAS.clone())
        self.width, self.gated, self.strength = width, gated, 1.0
        self.embed = nn.Sequential(nn.Linear(width, 20), nn.SiLU(), nn.Linear(20, 20))
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.one, self.two = Residual(width, width, 20), Residual(width, 2 * width, 20)
        self.three = Residual(3 * width, width, 20)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.up = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x, level):
        half = self.width // 2
        angles = level[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(half) / half)[None]
        t = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype))
        h = one = self.one(self.first(x), t)
        h = self.two(self.down(h), t)
        if self.gated:
            h = h * h.mean((2, 3), keepdim=True)
        h = self.up(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.three(torch.cat([h, one], dim=1), t)
        return self.strength * self.last(F.silu(self.norm(h))) / self.sigmas[level].view(-1, 1, 1, 1)


class Plain(nn.Module):
    """What is left: BatchNorm, FiLM by level, 4×4 and 5×5 kernels, pools, x − f(x), negation, input used twice, 7×7."""

    shape = (2, 7, 7)

    def __init__(self):
        super().__init__()
        self.register_buffer("sigmas", SIGMAS.clone())
        self.film = nn.Embedding(4, 18)
        self.first, self.five = nn.Conv2d(2, 9, 3, padding=1), nn.Conv2d(9, 9, 5, padding=2, bias=False)
        self.four, self.mix = nn.Conv2d(9, 9, 4, stride=2, padding=1), nn.Conv2d(9, 2, 1)
        self.batch_norm, self.instance_norm = nn.BatchNorm2d(9), nn.InstanceNorm2d(9, affine=True)
        self.batch_norm.running_mean.normal_()
        self.batch_norm.running_var.uniform_(0.5, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, level):
        scale, shift = self.film(level)[:, :, None, None].chunk(2, dim=1)
        h = self.dropout(F.relu(self.batch_norm(self.first(2.0 * x - 1.0))))
        h = F.elu(self.instance_norm(h) * (1 + scale) + shift)
        h = self.five(h) + F.max_pool2d(h, 5, 1, 2) - F.avg_pool2d(h, 5, stride=1, padding=2)
        small = F.interpolate(self.four(h), size=h.shape[2:], mode="bilinear", align_corners=True)
        return x / 2 - torch.relu(self.mix(small + h)) * 0.5 + (-x) * self.sigmas[level][:, None, None, None]


def model_of(cls, *args, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(*args, **kwargs).eval()


def inputs(model, batch=5):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, *model.shape, generator=generator), torch.arange(batch) % len(SIGMAS)


@torch.no_grad()
def exact(model, x, level):
    return copy.deepcopy(model).double()(x.double(), level)


MODELS = {
    "U-Net": lambda: model_of(UNet),
    "the rest": lambda: model_of(Plain),
    "NCSN": lambda: with_shape(model_of(Network, SIGMAS, 1, 8, True)),
    "NCSNv2": lambda: with_shape(model_of(Network, SIGMAS, 1, 8, False)),
}


def with_shape(model, shape=(1, 12, 12)):
    model.shape = shape
    return model


@pytest.mark.parametrize("precision", ["float32", "direct"])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs(name, precision):
    model = MODELS[name]()
    x, level = inputs(model)
    native = NativeNetwork(model, 3, *model.shape[1:], precision)  # tuned for fewer than it gets
    assert relative_error(native(x, level), exact(model, x, level)) < 5e-6
    assert "float32" in native.describe()


@pytest.mark.parametrize("name", ["U-Net", "the rest"])
def test_every_instruction_set(isa, name):
    model = MODELS[name]()
    x, level = inputs(model)
    assert relative_error(NativeNetwork(model, 5, *model.shape[1:])(x, level), exact(model, x, level)) < 5e-6


@pytest.mark.parametrize("kind", ["score", "denoiser", "noise_prediction", "edm", "vp_denoiser", "flow"])
def test_predictions_as_scores(kind):
    """Scales by sigma of input and output, told to the network as a level, so that its norms' rows are looked up."""
    network = with_shape(model_of(Network, SIGMAS, 1, 8, True))
    score = as_score(network, kind, sigmas=SIGMAS, condition="level")
    x, level = inputs(network)
    native = NativeNetwork(score, 5, 12, 12, levels=len(SIGMAS))
    want = exact(score, x, level)
    assert relative_error(native(x, level), want) < max(5e-6, 2 * relative_error(score(x, level), want))


def test_ours_wrapped_and_accelerated():
    from sgm_engine.models import NCSN

    model = model_of(NCSN, [1.0, 0.3, 0.1], 1, 4, image_size=8)
    x, level = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
    wrapped = as_score(model, "score")
    for other in (wrapped, accelerate(model), accelerate(wrapped)):
        native = NativeNetwork(other, 2, 8, 8, channels=1, levels=3)
        assert relative_error(native(x, level), network64(model)(x, level)) < 5e-6


@pytest.mark.parametrize("name", ["U-Net", "the rest"])
def test_every_parameter_is_followed(name):
    """A change of any one parameter or statistic is packed by the next sync: nothing is a stale copy."""
    model = MODELS[name]()
    x, level = inputs(model)
    native = NativeNetwork(model, 5, *model.shape[1:])
    kept = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if b.is_floating_point())]
    for key, tensor in kept:
        before = native(x, level)
        with torch.no_grad():
            tensor.mul_(1.5).add_(0.01)
        assert native.sync() >= 1, key
        after = native(x, level)
        assert relative_error(after, exact(model, x, level)) < 1e-5, key
        assert key == "embed.0.bias" or not torch.equal(before, after), key


class Branching(UNet):
    def forward(self, x, level):
        return super().forward(x if x.mean() > 0 else -x, level)


def hooked():
    model = model_of(UNet)
    model.one.conv1.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def oblong():
    model = model_of(UNet)
    model.one.conv2 = nn.Conv2d(12, 12, (3, 1), padding=(1, 0))
    return model


def guided():
    model = model_of(UNet)
    return with_drift(model, lambda x, sigma: -x)


@pytest.mark.parametrize("make", [hooked, oblong, guided])
def test_what_a_run_does_is_followed(make):
    model = make()
    x, level = inputs(model_of(UNet))
    native = NativeNetwork(model, 5, 8, 8, channels=3, levels=4)
    assert relative_error(native(x, level), exact(model, x, level)) < 5e-6


class Scaling(nn.Module):
    def forward(self, x, level):
        return x * 2


REFUSED = {
    "gate": (lambda: model_of(UNet, gated=True), "a moment over several dimensions .mean of"),
    "control flow": (lambda: model_of(Branching), "it asks for values of its images"),
    "no convolution": (Scaling, "holds no convolution"),
    "float64": (lambda: model_of(UNet).double(), "must be float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_take_is_named(name):
    make, reason = REFUSED[name]
    model = make()
    with pytest.raises(Unsupported, match=reason):
        NativeNetwork(model, 1, 8, 8, channels=3, levels=4)
    assert refusal(model, "float32", (3, 8, 8), 4) is not None


def samples(model, executor, **kwargs):
    plan = annealed_langevin(SIGMAS, 2, step_lr=1e-3)
    engine = Engine(model, 2, sigmas=SIGMAS, shape=model.shape, executor=executor, **kwargs)
    return engine, engine.sample(3, plan=plan)


def test_engine_runs_it_whole():
    model = MODELS["U-Net"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine, found = samples(model, "auto")
    assert engine.executor == "native" and "convolutions: " in engine.describe()
    assert relative_error(found, samples(model, "eager")[1].double()) < 1e-5


def test_engine_runs_the_rest_hybrid_and_says_so():
    model = model_of(UNet, gated=True)
    with pytest.warns(UserWarning, match=r"cannot run this model: .*several.*; executor='hybrid' runs it"):
        engine, found = samples(model, "auto")
    assert engine.executor == "hybrid" and "packed convolutions" in engine.describe()
    assert relative_error(found, samples(model, "eager")[1].double()) < 1e-5
    with pytest.raises(ValueError, match=r"executor='native' cannot run this model: .* moment over several"):
        samples(model, "native")


@pytest.mark.parametrize("executor", ["native", "hybrid"])
def test_a_bucket_runs_like_its_engine(executor):
    engine = Engine(model_of(UNet, gated=executor == "hybrid"), 2, executor=executor, buckets=(1,))
    engine.sample(1, plan=annealed_langevin(SIGMAS, 1, step_lr=1e-3))
    assert engine._slots.batch == 1 and engine.executor == executor


@pytest.mark.parametrize("gated", [False, True])
def test_weights_and_settings_are_followed(gated):
    """By the next request: an optimizer's step, and what the trace took as a number."""
    model = model_of(UNet, gated=gated)
    plan = annealed_langevin(SIGMAS, 2, step_lr=1e-3)
    engine = Engine(model, 2, executor="hybrid" if gated else "native")
    before = engine.sample(2, plan=plan)
    with torch.no_grad():
        model.two.conv1.weight.mul_(1.1)
        model.first.bias.add_(0.1)
    model.strength = 0.5
    after = engine.sample(2, plan=plan)
    assert not torch.equal(before, after)
    assert relative_error(after, Engine(model, 2, executor="eager").sample(2, plan=plan).double()) < 1e-5


def test_control_flow_runs_eager_and_says_so():
    with pytest.warns(UserWarning, match="values of its images .*; executor='eager' runs it"):
        engine, _ = samples(model_of(Branching), "auto")
    assert engine.executor == "eager"


def test_direct_is_refused_elsewhere():
    model = model_of(UNet, gated=True)
    with pytest.raises(ValueError, match=r"needs executor='native', which cannot run this model: .*moment"):
        Engine(model, 2, precision="direct")
    for executor in ("eager", "hybrid"):
        with pytest.raises(ValueError, match=f"needs executor='native', not '{executor}'; use precision='float32'"):
            Engine(model_of(UNet), 2, precision="direct", executor=executor)


def test_direct_runs_no_winograd():
    engine, found = samples(MODELS["U-Net"](), "auto", precision="direct")
    assert engine.executor == "native" and "winograd" not in engine.describe() and "direct float32" in engine.describe()
    assert relative_error(found, samples(MODELS["U-Net"](), "eager")[1].double()) < 1e-5
