"""An engine in float8, emulated: live weights, accelerated networks, refusals."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.engine.engine import Engine
from sgm_engine.executors import network as network_module
from sgm_engine.executors.graphs import GraphExecutor
from sgm_engine.executors.network import Network
from sgm_engine.jobs.spec import Geometry
from sgm_engine.models.ncsn import NCSN
from sgm_engine.rewriting import acceleration
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.chosen_conv import ChosenConv
from sgm_engine.rewriting.float8 import config as module
from sgm_engine.rewriting.float8.config import Float8Config, convolutions, qualifies
from sgm_engine.rewriting.float8.conv import Float8Conv
from sgm_engine.tuning.float8_calibration import calibrate_float8
from tests.fake_graphs import FakeGraphs
from tests.models.test_models import GOLDEN, golden
from tests.rewriting.float8_networks import PLAN, SIGMAS, Normed, net, scales  # noqa: F401 - fixtures

CPU = torch.device("cpu")


class Unfollowed(Normed):
    """Its forward depends on values, so that only its norms can be replaced."""

    def forward(self, x, level):
        return self.last(self.inside(F.elu(self.norm(self.first(x))))) if bool(x.isfinite().all()) else x


def engine(net, scales, **options):
    return Engine(net, 4, precision="float8", float8=scales, executor="eager", **options)


@torch.no_grad()
def score(engine):
    engine._network.sync()
    x = torch.rand(3, *engine.shape, generator=torch.Generator().manual_seed(0))
    return engine._network(x, torch.tensor([0, 1, 2])).float()


def test_two_of_five_convolutions(net, scales):
    ours = engine(net, scales)
    assert ours.describe() == (
        "eager, float8, batch 4: 2 of 5 convolutions in float8 (emulated), the others in bfloat16"
    )
    found, exact = score(ours), score(Engine(net, 4, executor="eager"))
    half = score(Engine(net, 4, precision="bfloat16", executor="eager"))
    layers = [m for m in ours._network.forward_module.modules() if isinstance(m, Float8Conv)]
    assert len(layers) == 2 and {type(m) for m in net.modules()} & {Float8Conv} == set()
    error, half_error = ((y - exact).norm() / exact.norm() for y in (found, half))
    assert half_error < error < 0.1
    assert torch.equal(ours.sample(4, 1, PLAN), ours.sample(4, 1, PLAN))


def test_changed_weights_are_quantised_anew(net, scales):
    """In place, whether an optimizer changes them or they are replaced; a graph that was captured sees it."""
    ours = engine(net, scales)
    ours._bind(GraphExecutor(backend := FakeGraphs()))
    before = ours.sample(2, 1, PLAN)
    with torch.no_grad():
        net.inside[1].weight.mul_(-1.7)
    after = ours.sample(2, 1, PLAN)
    assert not torch.equal(before, after) and len(backend.captured) == 1
    assert torch.equal(after, engine(net, scales).sample(2, 1, PLAN))
    net.inside[0].weight = nn.Parameter(net.inside[0].weight * 0.5)
    moved = ours.sample(2, 1, PLAN)
    assert not torch.equal(moved, after) and torch.equal(moved, engine(net, scales).sample(2, 1, PLAN))


def test_of_an_accelerated_network(monkeypatch):
    """The convolution with its 2×2 mean is another one there, and stays bfloat16; the others are found in the graph."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NCSN(SIGMAS, channels=1, ngf=32, image_size=8).eval().requires_grad_(False)
    fast = accelerate(net)
    plain, scales = (calibrate_float8(m, 2, plan=PLAN, emulate=True) for m in (net, fast))
    assert len(plain.maxima) == 72 and set(plain.maxima) - set(scales.maxima) == {"res2.0.conv2.conv"}
    ours = engine(fast, scales)
    ran = []
    ours._network.sync()
    for m in ours._network.forward_module.modules():
        if isinstance(m, Float8Conv):
            m.register_forward_hook(lambda *_: ran.append(1))
    found, exact = score(ours), score(Engine(net, 4, executor="eager"))
    assert len(ran) == 71 and (found - exact).norm() / exact.norm() < 0.3  # of a random network of 8×8 pixels
    said = "71 of 75 convolutions in float8 (emulated), the others in bfloat16; 61 norms write float8"
    assert said in ours.describe()
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(acceleration, "chosen", lambda m, device: ChosenConv(m) if type(m) is nn.Conv2d else m)
        joined = accelerate(net)
    assert any("convolution before it" in what for what in joined.report.replaced)
    again = engine(joined, scales)
    assert torch.equal(score(again), found) and said in again.describe(), "through ConvNorm, where nothing is tuned"
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a norm in float8 has no gradient"):
        ours._network(torch.rand(2, 1, 8, 8).requires_grad_(), torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr(network_module, "fuse_quantisation", lambda module: 0)
    assert torch.equal(score(engine(fast, scales)), found), "who rounds to float8, the norm or the layer, is all one"
    more = replace(scales, maxima=scales.maxima | {"res2.0.conv2.conv": 1.0})
    assert torch.equal(score(engine(fast, more)), found), "it is not called: the layer of its name is of no account"


def test_of_an_accelerated_network_that_was_not_traced_yet(net):
    fast = accelerate(net, None)
    fast._built.clear()
    fast.report = None
    scales = calibrate_float8(fast, 2, plan=PLAN, emulate=True)
    assert fast.report is not None, "before it was copied for bfloat16, in which a trace cannot be checked"
    engine(fast, scales)
    assert len(fast._built) == 1


def test_an_accelerated_network_that_no_trace_can_follow():
    """It is a copy with other norms: its convolutions are watched and replaced all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Unfollowed().eval()
    fast = accelerate(plain)
    assert fast.report.replaced == {"norm": ["norm"]}
    scales = calibrate_float8(fast, 4, plan=PLAN, emulate=True)
    assert list(scales.maxima) == ["inside"]
    found, want = (score(engine(net, scales)) for net in (fast, plain))
    assert (found - want).norm() < 1e-2 * want.norm()
    assert (found - score(Engine(fast, 4, precision="bfloat16"))).norm() > 2e-2 * want.norm()


def test_scales_are_part_of_a_jobs_identity(net, scales):
    one, other = (Geometry.of(engine(net, s)) for s in (scales, replace(scales, margin=8.0)))
    assert one.precision == f"float8 {scales.digest}" != other.precision


def test_there_is_no_gradient(net, scales):
    ours = engine(net, scales)
    ours._network.sync()
    with pytest.raises(RuntimeError, match="precision='float8' has no gradient"):
        ours._network(torch.rand(1, 1, 8, 8, requires_grad=True), torch.tensor([0]))


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_the_error_of_one_evaluation_of_the_golden_networks(name):
    """All 3×3 convolutions but the first and the last, although theirs have 4 to 16 channels only. -s prints it."""
    kind, options = GOLDEN[name]
    model, x, level, exact = golden(name, kind, **options)
    taking_part = {n: 1.0 for n, m in convolutions(model).items() if qualifies(m, channels=4)}
    maxima = {}
    for n in taking_part:
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, inputs, n=n: maxima.update({n: max(maxima.get(n, 0), inputs[0].abs().max().item())})
        )
    model(x, level)
    for n in taking_part:
        model.get_submodule(n)._forward_pre_hooks.clear()
    found = {}
    for precision in ("bfloat16", "float8"):
        scales = Float8Config(maxima, channels=4, emulate=True) if precision == "float8" else None
        network = Network(model, precision, CPU, float8=scales)
        network.sync()
        found[precision] = ((network(x, level) - exact).norm() / exact.norm()).item()
    print(f"\n{name}: {len(maxima)} layers, float8 {found['float8']:.2g}, bfloat16 {found['bfloat16']:.2g}")
    assert found["bfloat16"] < found["float8"] < 32 * found["bfloat16"]  # a bfloat16 has sixteen times the digits


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, {"precision": "bfloat16"}, "float8=… is for precision='float8', got 'bfloat16'"),
        ({"emulate": False}, {}, r"needs a CUDA device, got cpu.*emulate=True"),
        ({"maxima": {"inside.7": 1.0}}, {}, r"calibrated on another network: this one has no 'inside\.7'"),
        ({"maxima": {"point": 1.0}}, {}, "finds nothing to do: none of 5 convolutions is 3×3"),
        ({}, {"executor": "native"}, "native. runs float32, bfloat16 or direct, got precision=.float8"),
        ({}, {"executor": "hybrid"}, "precision='float8'"),
    ],
)
def test_what_an_engine_refuses(net, scales, change, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(net, 4, **{"precision": "float8", "float8": replace(scales, **change), "executor": "eager"} | options)


def test_without_a_calibration(net):
    with pytest.raises(ValueError, match=r"needs float8=calibrate_float8\(model\).*docs/float8\.md"):
        Engine(net, 4, precision="float8")


@pytest.mark.parametrize(
    "capability, hip, fits", [((8, 0), None, 0), ((8, 9), None, 1), ((10, 0), None, 1), ((9, 4), "6", 0)]
)
def test_which_gpus_have_it(monkeypatch, scales, capability, hip, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    ours, cuda = replace(scales, emulate=False), torch.device("cuda")
    if fits:
        return module.check_float8(ours, "float8", cuda)
    with pytest.raises(ValueError, match=r"needs e4m3 tensor cores \(compute capability 8\.9\), which a GPU does not"):
        module.check_float8(ours, "float8", cuda)
    module.check_float8(scales, "float8", cuda)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"maxima": {"a": 0.0}}, "maxima must be positive and finite, got 0.0 for 'a'"),
        ({"maxima": {"a": float("nan")}}, "maxima must be positive"),
        ({"margin": 0.5}, r"margin must be in \[1, 256\], got 0.5"),
        ({"emulate": 1}, "emulate must be True or False"),
        ({"channels": 16, "emulate": False}, "channels must be a multiple of 32, got 16"),
    ],
)
def test_scales_that_are_refused(scales, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        replace(scales, **change)
