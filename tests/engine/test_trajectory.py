"""An official-style loop, fed our noise, against the engine; and weights that change between two requests."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.engine.engine import Engine
from sgm_engine.executors.graphs import GraphExecutor
from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.rewriting.acceleration import accelerate
from tests.fake_graphs import FakeGraphs
from tests.plain_networks import Network

DATA = Path(__file__).parents[1] / "data"
STEP_LR = {1: 2e-5, 2: 6.2e-6}
STEPS = {1: 20, 2: 1}  # a level: 10 levels of NCSN, 232 of NCSNv2


def noise(shape, draw, kind="normal"):
    """The engine's noise of samples 0, 1, … of seed 7: draw 0 starts the chain, draw k belongs to step k."""
    out = torch.empty(shape)
    n = shape[0]
    ops.noise_fill_(out, torch.full((n,), 7), torch.arange(n), draw, STREAM["sample"], kind)
    return out


@torch.no_grad()
def official_loop(network, sigmas, steps, step_lr, shape, dtype, denoise):
    """Annealed Langevin as the authors' programs write it; the last iterate is returned."""
    x = noise(shape, 0, "uniform").to(dtype)
    draw = 0
    for c, sigma in enumerate(sigmas):
        labels = torch.ones(shape[0], dtype=torch.int64) * c
        step_size = step_lr * (sigma / sigmas[-1]) ** 2
        for _ in range(steps):
            draw += 1
            grad = network(x, labels)
            x = x + step_size * grad + noise(shape, draw).to(dtype) * np.sqrt(step_size * 2)
    if denoise:
        x = x + sigmas[-1] ** 2 * network(x, (len(sigmas) - 1) * torch.ones(shape[0], dtype=torch.int64))
    return x


def original(version):
    """(plain PyTorch network with the golden weights, our network with the same)."""
    name = {1: "golden_ncsn_32_ngf8.pth", 2: "golden_ncsnv2_32_ngf8.pth"}[version]
    options = {"sigmas": torch.logspace(0, -2, 10)} if version == 1 else {}
    ours = load_checkpoint(DATA / name, ema=False, image_size=8, **options)
    plain = Network(ours.sigmas, 3, 8, conditional=version == 1)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return plain.eval(), ours


@pytest.mark.parametrize("version", [1, 2])
def test_two_hundred_steps(version):
    """The engine's distance from float64 is at most twice that of the official loop in float32."""
    plain, ours = original(version)
    sigmas, steps, step_lr = ours.sigmas.double().numpy(), STEPS[version], STEP_LR[version]
    assert len(sigmas) * steps >= 200
    shape, denoise = (1, 3, 8, 8), version == 2
    plan = annealed_langevin(sigmas, steps, step_lr, denoise=denoise)
    found = Engine(ours, batch=1).sample(1, seed=7, plan=plan)
    fast = Engine(accelerate(plain, shape[1:]), batch=1, shape=shape[1:]).sample(1, seed=7, plan=plan)
    loop = official_loop(plain, sigmas, steps, step_lr, shape, torch.float32, denoise)
    exact = official_loop(plain.double(), sigmas, steps, step_lr, shape, torch.float64, denoise)
    scale = exact.norm()
    allowed = 2 * (loop - exact).norm() / scale + 1e-7
    assert (found - exact).norm() / scale <= allowed and (fast - exact).norm() / scale <= allowed
    assert allowed < 1e-4 < (noise(shape, 1) - exact).norm() / scale


def engine_of(executor, model, precision):
    """An engine; "graph" is over the fake backend of test_executor.py, whose replays run none of the model's Python."""
    name = "eager" if executor == "graph" else executor
    engine = Engine(model, 2, precision=precision, executor=name, shape=(3, 8, 8))
    if executor == "graph":
        engine._bind(GraphExecutor(FakeGraphs()))
    return engine


PAIRS = (("ours", "eager"), ("ours", "graph"), ("ours", "native"), ("accelerated", "eager"), ("accelerated", "graph"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "executor"), PAIRS)
def test_an_optimizer_step_changes_the_samples(kind, executor, precision):
    plain, ours = original(1)
    model = ours if kind == "ours" else accelerate(plain, (3, 8, 8))
    plan = annealed_langevin(ours.sigmas, 1, 1e-4)
    engine = engine_of(executor, model, precision)
    first = engine.sample(2, seed=7, plan=plan)
    assert torch.equal(first, engine.sample(2, seed=7, plan=plan))
    captures = engine.stats.captures
    assert captures == (1 if executor == "graph" else 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(torch.rand(2, 3, 8, 8), torch.tensor([0, 5])).square().mean().backward()
    optimizer.step()
    second = engine.sample(2, seed=7, plan=plan)
    assert not torch.equal(first, second)
    fresh = engine_of(executor, model, precision).sample(2, seed=7, plan=plan)
    assert torch.equal(second, fresh), "as a new engine on the new weights"
    assert engine.stats.captures == captures, "in place: no new capture"
    if precision == "float32":  # another object in a parameter's place
        target = (model.source if kind == "accelerated" else model).res2[0].conv2.conv
        target.weight = torch.nn.Parameter(target.weight.detach() * 1.5)
        third = engine.sample(2, seed=7, plan=plan)
        assert not torch.equal(second, third)
        assert torch.equal(third, engine_of(executor, model, precision).sample(2, seed=7, plan=plan))
        assert engine.stats.captures == captures + (executor == "graph")
