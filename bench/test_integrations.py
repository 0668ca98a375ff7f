"""What the engine gains inside other libraries: their own loop over the same network against ours, on one thread.

What is gained is the network's speed: an NCSN runs on the native executor wherever the adapter calls it. The loops
alone, over a network of less than a millisecond that both sides call as it is, cost about the same, noise included.
Correctness first: where both are deterministic they must agree. Ratios are floors that a regression would break.
"""

import random
import threading
import time
from itertools import pairwise

import pytest
import torch
from torch import nn

from bench.common import about, paired_ratio
from bench.service import requests, tiny
from bench.stand_ins import deepinv as real_deepinv
from bench.stand_ins import k_diffusion as real_k_diffusion
from sgm_engine.integrations import azula, deepinv, edm
from sgm_engine.integrations import k_diffusion as kd
from sgm_engine.kernels import reference
from sgm_engine.models import blocks
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import ancestral, ddim
from sgm_engine.service.service import SamplerService

B, SHAPE, LEVELS = 8, (3, 32, 32), 20


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Small(nn.Module):
    """A network whose loop counts: two convolutions. A denoiser(x, sigma[, labels]) of data in [−1, 1]."""

    sigma_min, sigma_max = 0.0, float("inf")

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, sigma, labels=None, **_):
        scale = sigma.float().reshape(-1, 1, 1, 1).square().add(1).rsqrt()
        x = x.float()
        return scale * (scale * x + self.outer(torch.relu(self.inner(scale * x))))


def sigmas(high=10.0):
    return torch.cat([torch.logspace(0, -3, LEVELS) * high, torch.zeros(1)])


def start():
    return 10.0 * torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(0))


def report(benchmark, name, theirs, ours, floor):
    with torch.no_grad():
        ratio = paired_ratio(theirs, ours, pairs=8, clock=time.thread_time, block=0.05)
        benchmark.pedantic(ours, rounds=3)
    benchmark.extra_info |= about() | {"ratio": str(ratio)}
    print(f"\n{name}: {ratio}")
    assert ratio.high > floor, f"{name}: {ratio} of theirs over ours; it was at least {floor}"


def test_k_diffusion_loop(benchmark):
    sampling, _ = real_k_diffusion()
    net = Small()
    with torch.no_grad():
        torch.testing.assert_close(
            kd.sample_ddim(net, start(), sigmas(), disable=True),
            sampling.sample_euler(net, start(), sigmas(), disable=True),
            rtol=1e-3,
            atol=1e-3,
        )
    report(
        benchmark,
        "k-diffusion, sample_euler_ancestral, a small network",
        lambda: sampling.sample_euler_ancestral(net, start(), sigmas(), disable=True),
        lambda: kd.sample_ancestral(net, start(), sigmas(), disable=True),
        0.75,
    )


@pytest.fixture
def ncsn():
    torch.manual_seed(0)
    return NCSN(torch.logspace(0, -2, 10).tolist(), channels=1, ngf=32).eval()


class Plain(nn.Module):
    """D(x, sigma) by the NCSN as plain PyTorch: its norm the published formula."""

    def __init__(self, net):
        super().__init__()
        self.net = deepinv.Denoiser(net)

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma).expand(len(x))
        fused, blocks.ops.noise_conditioned_norm = blocks.ops.noise_conditioned_norm, reference.noise_conditioned_norm
        try:
            level = torch.from_numpy(self.net._levels(sigma.double().numpy()))
            return x + sigma.reshape(-1, 1, 1, 1).square() * self.net.model(x, level)
        finally:
            blocks.ops.noise_conditioned_norm = fused


def test_k_diffusion_with_an_ncsn(benchmark, ncsn):
    sampling, _ = real_k_diffusion()
    levels = torch.cat([torch.logspace(0, -2, 10), torch.zeros(1)])
    x = torch.randn(B, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    plain, fast = Plain(ncsn), deepinv.Denoiser(ncsn)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, 1.0), plain(x, torch.ones(B)), rtol=1e-3, atol=1e-3)
    report(
        benchmark,
        "k-diffusion, sample_euler_ancestral, NCSN ngf 32",
        lambda: sampling.sample_euler_ancestral(plain, x, levels, disable=True),
        lambda: kd.sample_ancestral(fast, x, levels, disable=True),
        2.0,
    )


def test_deepinv_plug_and_play(benchmark, ncsn):
    real = real_deepinv()
    physics = real.physics.Denoising(real.physics.GaussianNoise(0.1))
    y = torch.rand(B, 1, 28, 28)

    def restore(denoiser):
        return real.optim.PGD(
            real.optim.L2(),
            prior=real.optim.PnP(denoiser),
            stepsize=0.5,
            sigma_denoiser=torch.full((B,), 0.1),
            max_iter=4,
        )

    theirs, ours = restore(Plain(ncsn)), restore(deepinv.Denoiser(ncsn))
    with torch.no_grad():
        torch.testing.assert_close(ours(y, physics), theirs(y, physics), rtol=1e-2, atol=1e-2)
    report(
        benchmark,
        "deepinv, PGD with a PnP prior, NCSN ngf 32",
        lambda: theirs(y, physics),
        lambda: ours(y, physics),
        2.0,
    )


def test_azula_loop(benchmark):
    denoise = pytest.importorskip("azula.denoise", reason="pip install --no-deps azula, and einops")
    schedule = pytest.importorskip("azula.noise", reason="pip install --no-deps azula, and einops").VESchedule(
        1e-2, 1e1
    )
    sample = pytest.importorskip("azula.sample", reason="pip install --no-deps azula, and einops")

    class Backbone(Small):
        def forward(self, x, t, **_):
            return super().forward(x, t.exp())

    net = denoise.KarrasDenoiser(Backbone(), schedule)
    theirs = sample.DDPMSampler(net, steps=LEVELS, silent=True)
    ours = azula.PlanSampler(net, ancestral, steps=LEVELS, silent=True)
    x = start()
    report(benchmark, "azula, DDPMSampler, a small network", lambda: theirs(x), lambda: ours(x), 0.7)


def test_edm_loop(benchmark):
    """EDM's program is not a package: its first-order loop with churn, in float64 as there, written out."""
    net = Small()
    latents = start() / 10
    ramp = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    t = (10 ** (1 / 7) + ramp * (0.01 ** (1 / 7) - 10 ** (1 / 7))) ** 7
    t = torch.cat([t, torch.zeros(1)])

    def theirs(churn=True):
        x = latents.double() * t[0]
        for now, after in pairwise(t):
            noisier = now * 1.05 if churn else now
            x_hat = x + (noisier**2 - now**2).sqrt() * torch.randn_like(x)
            x = x_hat + (after - noisier) * (x_hat - net(x_hat, noisier).double()) / noisier
        return x

    def ours(plan=ancestral):
        return edm.sampler_fn(net, latents, num_steps=LEVELS, sigma_min=0.01, sigma_max=10, plan=plan)

    with torch.no_grad():
        torch.testing.assert_close(ours(ddim).double(), theirs(churn=False), rtol=1e-3, atol=1e-3)
    report(benchmark, "EDM, its first-order loop with churn, a small network", theirs, ours, 1.0)


NETWORKS = {
    "of 16 and 32 channels": ((32, (16, 32), ("", "")), {"norm_num_groups": 8, "layers_per_block": 1}, 0.8),
    "28×28, with attention": ((28, (32, 64, 64), ("", "Attn", "")), {"norm_num_groups": 8}, 2.0),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_diffusers_pipeline(benchmark, network):
    """Ten evaluations of its network in its loop, against ours: DDPMPipeline / PlanPipeline."""
    diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")
    from sgm_engine.integrations.diffusers import PlanPipeline, PlanScheduler

    torch.manual_seed(0)
    (size, widths, kinds), options, floor = NETWORKS[network]
    down, up = ([f"{kind}{way}Block2D" for kind in kinds] for way in ("Down", "Up"))
    unet = diffusers.UNet2DModel(
        size, block_out_channels=widths, down_block_types=down, up_block_types=up[::-1], **options
    ).eval()
    theirs, ours = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), PlanPipeline(unet, PlanScheduler())
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    report(
        benchmark,
        f"diffusers, DDPMPipeline, UNet2DModel {network}",
        lambda: theirs(4, num_inference_steps=10, output_type="pt"),
        lambda: ours(4, num_inference_steps=10, output_type="pt"),
        floor,
    )


@pytest.mark.quick
def test_service_against_taking_turns(benchmark):
    """Eight clients whose requests take 1–6 samples: one running batch against one request after the other. CPU time of
    the process, so that waiting costs nothing."""
    asked = [r for mine in requests(8, 6, (1, 8, 8)) for r in mine]
    random.Random(0).shuffle(asked)
    one, solo = tiny(), tiny()
    turn = threading.Lock()

    def together():
        with SamplerService(one) as service:
            return [f.result() for f in [service.submit(**r) for r in asked]]

    def in_turns():
        with turn:
            return [solo.sample(**r) for r in asked]

    assert all(torch.equal(a, b) for a, b in zip(together(), in_turns(), strict=True))
    ratio = paired_ratio(in_turns, together, pairs=5, clock=time.process_time)
    benchmark.pedantic(together, rounds=3)
    benchmark.extra_info |= about() | {"taking turns / together": str(ratio)}
    print(f"\nrequests of 1–6 samples on 8 slots, one after the other over together: {ratio}")
    assert ratio.high > 1.3, f"{ratio}: sharing a batch should take far fewer evaluations"
