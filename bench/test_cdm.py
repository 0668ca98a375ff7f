"""A step of a classification diffusion model against a forward pass of its network: one thread, CPU time."""

import time

import pytest
import torch

from bench.common import about, paired_ratio
from sgm_engine import _C, annealed_langevin
from sgm_engine.engine import Engine
from sgm_engine.kernels import ops, reference
from sgm_engine.native_cdm import _unet
from sgm_engine.native_graph import Graph
from sgm_engine.training.config import TrainConfig

BATCH, MOST = 16, 3.2


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1), _C.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0]), _C.set_num_threads(threads[1])


def native_forward(net):
    """The U-Net up to its last convolution, which is then read through one 1×1; from planes, not from x."""
    graph = Graph(BATCH, "float32")
    out = _unet(graph, net, graph.load(net.begin.in_channels, 14, 14))
    graph.store(out, torch.nn.Conv2d(out.channels, 1, 1))
    graph.plan()
    x, level = torch.randn(BATCH, net.begin.in_channels, 14, 14), torch.zeros(BATCH, dtype=torch.int64)
    score = torch.empty(BATCH, 1, 14, 14)
    return lambda: graph.run(x, level, score)


@pytest.mark.quick
def test_step_against_forward(benchmark, one_thread):
    """A step is forward, backward to the input and update: at most 3.2 forward passes, eager and native alike."""
    torch.manual_seed(0)
    model = TrainConfig.read("cdm_mnist_small").model(1, 28).build().eval()
    torch.nn.init.normal_(model.classifier.head.weight, std=0.01)
    plan = annealed_langevin(model.sigmas[-2:], 2, step_lr=1e-6, denoise=False).on_levels(model.sigmas)
    u, level = torch.randn(BATCH, 1, 28, 28), torch.full((BATCH,), 80)
    eager, native = (Engine(model, BATCH, executor=name) for name in ("eager", "native"))
    with torch.no_grad():
        ours, double = model(u, level), model.double()(u.double(), level)
        torch.testing.assert_close(ours.double(), double, rtol=1e-3, atol=1e-3 * double.abs().max().item())
        model.float()

    @torch.no_grad()
    def logits():
        return model.logits(u)

    def steps(engine):
        return lambda: engine.sample(BATCH, plan=plan)

    pairs = {
        "eager": (steps(eager), logits),
        "native": (steps(native), native_forward(model.classifier)),
        "faster": (steps(eager), steps(native)),
    }
    found = {name: paired_ratio(*pair, pairs=7, clock=time.thread_time) for name, pair in pairs.items()}
    step = {name: found[name].median / plan.nfe for name in ("eager", "native")}
    benchmark.pedantic(steps(native), rounds=3)
    benchmark.extra_info |= about() | {"step / forward": {k: round(v, 2) for k, v in step.items()}}
    for name, cost in step.items():
        print(f"\nCDM, 28×28, B = {BATCH}, {name}: a step costs {cost:.2f} forward passes of its U-Net")
    print(f"a native step is {found['faster']} times as fast as an eager one")
    assert max(step.values()) <= MOST, f"a step costs {step} forward passes, more than {MOST}"
    assert found["faster"].low > 1.5, f"native only {found['faster']} times as fast"


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
