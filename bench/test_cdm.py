"""A step of a classification diffusion model against a forward pass of its network: one thread, CPU time."""

import time

import pytest
import torch

from bench.common import about, paired_ratio
from sgm_engine import annealed_langevin
from sgm_engine.engine.engine import Engine
from sgm_engine.executors.native.cdm import _unet
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.potential import _embedded, _fields, _tables
from sgm_engine.kernels import ops, reference
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.training.config import TrainConfig

MOST = 3.2


def native_forward(net, batch, size):
    """The U-Net up to its last convolution, which is then read through one 1×1; from planes, not from x."""
    graph = Graph(batch, "float32")
    planes = net.begin.in_channels
    out = _unet(graph, net, graph.load(planes, size, size), None)
    graph.store(out, torch.nn.Conv2d(out.channels, 1, 1))
    graph.plan()
    x, level = torch.randn(batch, planes, size, size), torch.zeros(batch, dtype=torch.int64)
    score = torch.empty(batch, 1, size, size)
    return lambda: graph.run(x, level, score)


def wide():
    sizes = {"channels": 3, "image_size": 32, "width": 64, "multipliers": (1, 2, 2), "blocks": 1, "attention": (16,)}
    return CDMConfig(**sizes, schedule="uniform", levels=100)


CASES = {
    "cdm_mnist_small": (lambda: TrainConfig.read("cdm_mnist_small").model(1, 28), 16, 7),
    "64 channels, 32×32": (wide, 4, 3),
}


@pytest.mark.parametrize("name", [pytest.param("cdm_mnist_small", marks=pytest.mark.quick), "64 channels, 32×32"])
def test_step_against_forward(benchmark, one_thread, name):
    """A step is forward, backward to the input and update: at most 3.2 forward passes, eager and native alike."""
    config, batch, count = CASES[name]
    torch.manual_seed(0)
    model = config().build().eval()
    torch.nn.init.normal_(model.classifier.head.weight, std=0.01)
    plan = annealed_langevin(model.sigmas[-2:], 2, step_lr=1e-6, denoise=False).on_levels(model.sigmas)
    u, level = torch.randn(batch, *model.shape), torch.full((batch,), 80)
    eager, native = (Engine(model, batch, executor=name) for name in ("eager", "native"))
    with torch.no_grad():
        ours, double = model(u, level), model.double()(u.double(), level)
        torch.testing.assert_close(ours.double(), double, rtol=1e-3, atol=1e-3 * double.abs().max().item())
        model.float()

    @torch.no_grad()
    def logits():
        return model.logits(u)

    def steps(engine):
        return lambda: engine.sample(batch, plan=plan)

    size = model.shape[1] // model.classifier.patch
    pairs = {
        "eager": (steps(eager), logits),
        "native": (steps(native), native_forward(model.classifier, batch, size)),
        "faster": (steps(eager), steps(native)),
    }
    found = {kind: paired_ratio(*pair, pairs=count, clock=time.thread_time) for kind, pair in pairs.items()}
    step = {kind: round(found[kind].median / plan.nfe, 2) for kind in ("eager", "native")}
    benchmark.pedantic(steps(native), rounds=3)
    benchmark.extra_info |= about() | {"step / forward": step, "native, times faster": found["faster"].median}
    print(f"\nCDM, {name}, B = {batch}: forward passes of its U-Net that a step costs: {step};")
    print(f"  a native step is {found['faster']} times as fast as an eager one")
    assert max(step.values()) <= MOST, f"a step costs {step} forward passes, more than {MOST}"
    assert found["faster"].low > 1.5, f"native only {found['faster']} times as fast"


def native_fields(model, batch):
    """The way forward of a network of potentials, from x to its fields."""
    graph = Graph(batch, "float32")
    net = model.classifier
    tables, octaves = _tables(model, [1.0]), len(net.features.waves)
    planes, noise = graph.noise_features(model.shape, net.potentials, net.features.waves.shape[1], tables, octaves)
    out = _fields(graph, net, planes, _embedded(graph, net, noise, None))
    graph.store(out, torch.nn.Conv2d(out.channels, 1, 1))
    graph.plan()
    score = torch.empty(batch, 1, out.height, out.width)
    return lambda u, level: graph.run(u, level, score)


@pytest.mark.quick
def test_potential_against_eager_and_forward(benchmark, one_thread):
    """A native score of cdm_mnist at B = 16, against eager and against its own way forward."""
    torch.manual_seed(0)
    model = TrainConfig.read("cdm_mnist").model(1, 28).build().eval()
    u, level = torch.randn(16, *model.shape), torch.full((16,), 64)
    network, forward = NativeNetwork(model, 16, 28, 28), native_fields(model, 16)

    def native():
        return network(u, level)

    def eager():
        return model(u, level)

    with torch.no_grad():
        torch.testing.assert_close(native(), eager(), rtol=1e-4, atol=1e-5)
    step = paired_ratio(native, lambda: forward(u, level), pairs=9, clock=time.thread_time)
    faster = paired_ratio(eager, native, pairs=9, clock=time.thread_time)
    benchmark.pedantic(native, rounds=5)
    benchmark.extra_info |= about() | {"step / forward": step.median, "native, times faster": faster.median}
    print(
        f"\nCDM of potentials, B = 16: a native score is {faster} times as fast as an eager one, {step} forward passes"
    )
    assert step.low <= 3 and faster.high >= 2.3, f"{faster} times as fast, {step} forward passes"


@pytest.mark.quick
@pytest.mark.parametrize("shape, groups", [((16, 32, 14, 14), 32), ((8, 128, 32, 32), 32)])
def test_norm_gradient_against_pytorch(benchmark, one_thread, shape, groups):
    """GroupNorm + SiLU with the gradient of its input: two kernels against PyTorch's own and the formula's."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    gamma, beta = torch.ones(shape[1]), torch.zeros(shape[1])

    def gradient(norm):
        return torch.autograd.grad(norm(), x, dy)[0]

    def fused():
        return gradient(lambda: ops.noise_conditioned_norm(x, gamma, beta=beta, activation="silu", groups=groups))

    def plain():
        silu = torch.nn.functional.silu
        return gradient(lambda: silu(torch.nn.functional.group_norm(x, groups, gamma, beta)))

    def formula():
        arguments = (x, gamma, None, beta, None, "silu", None, 1e-5, groups)
        return gradient(lambda: reference.noise_conditioned_norm(*arguments))

    torch.testing.assert_close(fused(), formula(), rtol=1e-4, atol=1e-4)
    ratios = [paired_ratio(other, fused, pairs=9, clock=time.thread_time) for other in (plain, formula)]
    benchmark.pedantic(fused, rounds=5)
    benchmark.extra_info |= about() | {"PyTorch": str(ratios[0]), "formula": str(ratios[1])}
    print(f"\nGroupNorm + SiLU and gradient, {shape}: {ratios[0]} PyTorch's, {ratios[1]} the formula's")
    assert ratios[1].high > 1.2, f"{ratios[1]} times as fast as the formula it replaced"
