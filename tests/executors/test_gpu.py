"""The engine on a GPU: what its parts promise elsewhere on a CPU, with real graphs, streams and kernels.

Without a GPU they run on a pretended one, pretend_cuda.py, which shows the Python of all this and no more.
"""

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.jobs.job import generate
from sgm_engine.jobs.verify import verify
from sgm_engine.kernels import noise, ops
from sgm_engine.kernels.tables import conv as conv_table
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton.conv import ConvTile
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.models.guidance import classifier_free, classifier_guided, posterior
from sgm_engine.models.inverse import downsample
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.plans.samplers import predictor_corrector, sde_dpm_solver_2m
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.service.service import SamplerService
from sgm_engine.tuning.float8_calibration import calibrate_float8
from tests.cdm.test_cdm_sampling import small as small_cdm
from tests.executors.gpu_engines import PLAN, SHAPE, SIGMAS, difference, net
from tests.interpreter import run_pretended


def test_noise_and_update_are_the_definition():
    """Through the ops, as an engine calls them."""
    seed, sample_id = torch.tensor([7, -1], device="cuda"), torch.tensor([2**40, 3], device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        out = torch.full((2, 3, 8, 8), float("nan"), device="cuda").to(memory_format=layout)
        ops.noise_fill_(out, seed, sample_id, 2**32 - 1, noise.STREAM["user"], "normal")
        want = noise.fill((2, 3, 8, 8), seed.cpu().numpy(), sample_id.cpu().numpy(), 2**32 - 1, noise.STREAM["user"])
        assert torch.equal(out.cpu().contiguous(), torch.from_numpy(want))


@pytest.mark.parametrize("fast", [False, True], ids=["as it is", "accelerated"])
@pytest.mark.parametrize("precision, most", [("float32", 1e-4), ("tf32", 2e-2), ("bfloat16", 5e-2), ("float16", 2e-2)])
def test_samples_are_those_of_the_cpu(precision, most, fast):
    """Made on the CPU and moved, as a user would; by graphs and step by step; the same bytes twice."""
    want = Engine(net(), 4, executor="eager").sample(6, 3, PLAN)
    found = []
    for executor in ("graph", "eager"):
        model = accelerate(net()) if fast else net()
        engine = Engine(model, 4, "cuda", precision, executor)
        found.append(engine.sample(6, 3, PLAN))
        assert difference(found[-1], want) < most and engine.executor == executor
        assert torch.equal(engine.sample(6, 3, PLAN), found[-1])
        assert engine.stats.captures == (executor == "graph")
        assert not fast or "5×5 mean of a norm" in model.report.replaced
    assert difference(*found) < most / 4


def test_float8():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    model = accelerate(net(64).cuda())
    scales = calibrate_float8(model, 4)
    want = Engine(model, 4, precision="bfloat16").sample(6, 3, PLAN)
    engine = Engine(model, 4, precision="float8", float8=scales)
    assert difference(engine.sample(6, 3, PLAN), want) < 0.3
    assert "norms write float8" in engine.describe()


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_convolutions_by_the_table(precision, monkeypatch):
    """A tile for every shape, of convolutions by themselves and with the norm that follows."""
    if precision == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    asked, launched = set(), []

    class AnyShape(dict):
        def get(self, key, default=None):
            asked.add(key.partition(", ")[2])
            return ConvTile(pixels=64, channels=32, depth=32, warps=4, stages=2)

    def convolution(x, weight, bias, residual, dilation, out, partial=None, *rest):
        launched.append((x.dtype, residual is not None, partial is not None))
        real(x, weight, bias, residual, dilation, out, partial, *rest)

    scales = calibrate_float8(accelerate(net().cuda()), 1, plan=PLAN) if precision == "float8" else None
    want = Engine(accelerate(net().cuda()), 4, precision=precision, float8=scales).sample(6, 3, PLAN)
    real = triton_conv.convolution
    monkeypatch.setattr(triton_conv, "convolution", convolution)
    monkeypatch.setattr(conv_table, "table", lambda: {torch.cuda.get_device_name(): AnyShape(any=1)})
    engine = Engine(accelerate(net().cuda()), 4, precision=precision, float8=scales)
    assert difference(engine.sample(6, 3, PLAN), want) < 5e-2
    assert asked == {"", "then norm", "then sum and norm"}
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float8_e4m3fn
    assert {(dtype, False, False), (dtype, False, True), (dtype, True, True)} <= set(launched)


@pytest.mark.parametrize("plan", [PLAN, predictor_corrector(SIGMAS), sde_dpm_solver_2m(SIGMAS)], ids=lambda p: p.name)
def test_plans_inpainting_and_streams(plan):
    model = net().cuda()
    here, there = Engine(model, 4, precision="float32"), Engine(net(), 4, executor="eager")
    known, where = torch.rand(SHAPE), torch.rand(SHAPE) > 0.5
    for redraw in ("level", "step"):
        found, want = (e.inpaint(known, where, 6, 1, plan, redraw=redraw) for e in (here, there))
        assert difference(found, want) < 1e-3
        assert torch.equal(found.cpu()[:, where], known[where].expand(6, -1))
    assert difference(torch.stack([x for _, x in here.stream(range(6), 1, plan)]), there.sample(6, 1, plan)) < 1e-3


MODELS = {
    "classifier-guided": lambda model: classifier_guided(model, lambda x, sigma: -x.square().flatten(1).sum(1)),
    "classifier-free": lambda model: classifier_free(model, model, 1.5),
    "posterior": lambda model: posterior(
        model, downsample(2, SHAPE), torch.full((1, 1, 8, 8), 0.5, device=next(model.parameters()).device), 0.1
    ),
    "other levels": lambda model: at_sigmas(model, [1, 0.5, 0.1]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_made_of_models(name):
    """Some of them take gradients inside the graph."""
    found, want = (Engine(MODELS[name](net().to(d)), 4, d, "float32") for d in ("cuda", "cpu"))
    assert found.executor == "graph"
    plan = annealed_langevin(found.sigmas, 2, step_lr=1e-3)
    assert difference(found.sample(6, 3, plan), want.sample(6, 3, plan)) < 1e-3


@pytest.mark.parametrize("precision, most", [("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_classifier_of_noise(precision, most):
    here, there = small_cdm().cuda(), small_cdm()
    plan = annealed_langevin(there.sigmas, 2, step_lr=1e-3)
    want = Engine(there, 4, executor="eager").sample(6, 3, plan)
    assert difference(Engine(here, 4, precision=precision).sample(6, 3, plan), want) < most


def test_a_service_and_a_job(tmp_path):
    engine, want = Engine(net().cuda(), 4), Engine(net(), 4, executor="eager")
    with SamplerService(engine) as service:
        futures = [service.submit(3, seed=seed, plan=PLAN) for seed in range(3)]
        for seed, future in enumerate(futures):
            assert difference(future.result(), want.sample(3, seed, PLAN)) < 1e-3
    assert generate(engine, tmp_path / "job", 10, plan=PLAN, format="safetensors", shard_size=4).complete
    assert verify(tmp_path / "job").ok


run_pretended(globals())
