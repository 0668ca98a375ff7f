"""Adapters against the libraries themselves: signatures, results wherever both are deterministic, habits.

k-diffusion and deepinv run on their own code with empty torchvision modules where torchvision cannot be imported
(bench/stand_ins.py). EDM is no package: its calls are those of a network and a generator written here.
"""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from bench.stand_ins import deepinv as real_deepinv
from bench.stand_ins import k_diffusion as real_k_diffusion
from sgm_engine.integrations import azula, deepinv, edm
from sgm_engine.integrations import k_diffusion as kd
from sgm_engine.integrations.foreign import seeds
from sgm_engine.kernels import noise
from sgm_engine.models import NCSN
from sgm_engine.plans.plan import ancestral, ddim

SHAPE = (1, 4, 4)

AZULA = "pip install --no-deps azula, and einops"


class Blend(nn.Module):
    """The denoiser of data N(µ, 1) with a learnable µ: elementwise, so its bits do not depend on the batch."""

    sigma_min, sigma_max = 0.0, float("inf")

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, sigma, labels=None, scale=1.0):
        variance = sigma.reshape(-1, *(1,) * (x.dim() - 1)) ** 2
        shift = 0 if labels is None else labels.reshape(variance.shape)
        return scale * (x + variance * (self.mean + shift)) / (1 + variance)


def karras(n, high=10.0, low=0.01, zero=True):
    s = torch.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7
    return torch.cat([s, s.new_zeros(1)]) if zero else s


def engine_noise(shape, seed, draw):
    z = noise.fill((shape[0], 1, 1, int(np.prod(shape[1:]))), [seed] * shape[0], np.arange(shape[0]), draw)
    return torch.from_numpy(z).reshape(shape)


# -- k-diffusion -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def k_sampling():
    return next(iter(real_k_diffusion()))


def x_at(sigma, shape=(3, *SHAPE)):
    return sigma * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_k_diffusion_signature(k_sampling):
    want = list(inspect.signature(k_sampling.sample_euler).parameters)[:6]
    for sampler in (kd.sample_ald, kd.sample_consistent, kd.sample_ancestral, kd.sample_ddim, kd.sample):
        assert list(inspect.signature(sampler).parameters)[:6] == want


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [("ddim", "euler"), ("heun", "heun"), ("dpmpp_2m", "dpmpp_2m")])
def test_k_diffusion_deterministic_samplers_are_its_own(k_sampling, ours, theirs, zero):
    sigmas, told, want_told = karras(12, zero=zero), [], []
    model, extra = Blend(), {"scale": 1.01}
    got = getattr(kd, f"sample_{ours}")(model, x_at(10.0), sigmas, extra, told.append, True)
    want = getattr(k_sampling, f"sample_{theirs}")(model, x_at(10.0), sigmas, extra, want_told.append, True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if ours == "heun":  # its callback is not told of second evaluations
        told = [{**t, "i": t["i"] // 2} for t in told[::2]]
    assert len(told) == len(want_told) == len(sigmas) - 1
    for a, b in zip(told, want_told, strict=True):
        assert a.keys() == b.keys() and a["i"] == b["i"]
        assert a["sigma"] == b["sigma"] and a["sigma_hat"] == b["sigma_hat"]
        torch.testing.assert_close(a["x"], b["x"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a["denoised"], b["denoised"], rtol=1e-5, atol=1e-5)


def test_k_diffusion_ancestral_is_its_own_with_our_noise(k_sampling):
    sigmas, draws = karras(12), iter(range(1, 100))

    def ours(sigma, sigma_next):
        return engine_noise((3, *SHAPE), 5, next(draws))

    got = kd.sample_ancestral(Blend(), x_at(10.0), sigmas, disable=True, seed=5)
    want = k_sampling.sample_euler_ancestral(Blend(), x_at(10.0), sigmas, disable=True, noise_sampler=ours)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_k_diffusion_ald_is_the_published_loop():
    sigmas, x, draw = karras(6), x_at(10.0).double(), 0
    got = kd.sample_ald(Blend(), x_at(10.0), sigmas, disable=True, steps_per_level=3, step=0.2, seed=9)
    for sigma in sigmas[:-1].double():
        for _ in range(3):
            draw += 1
            alpha = 0.2 * sigma**2
            x = x + alpha * (Blend()(x, sigma) - x) / sigma**2 + (2 * alpha).sqrt() * engine_noise(x.shape, 9, draw)
    torch.testing.assert_close(got.double(), Blend()(x, sigmas[-2]), rtol=1e-5, atol=1e-5, check_dtype=False)


def test_k_diffusion_wrapper_of_a_ddpm():
    _, external = real_k_diffusion()

    class Eps(nn.Module):
        def forward(self, x, t, **_):
            return 0.1 * x + 0.001 * t.reshape(-1, 1, 1, 1)

    wrapped = external.DiscreteEpsDDPMDenoiser(Eps(), torch.linspace(0.999, 0.01, 50), quantize=True)
    sigmas = wrapped.get_sigmas(7)
    x = kd.sample_consistent(wrapped, x_at(float(sigmas[0])), sigmas, disable=True, seed=1)
    assert x.shape == (3, *SHAPE) and x.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 2), (3, 2, 3, 2, 2), (0, 1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_k_diffusion_any_shape_and_dtype(shape, dtype):
    seen = []

    def model(x, sigma):
        seen.append((x.shape, x.dtype, sigma.shape, sigma.dtype))
        return Blend()(x.float(), sigma.float()).to(x.dtype)

    x = kd.sample_ald(model, x_at(10.0, shape).to(dtype), karras(4), disable=True, steps_per_level=1)
    assert x.shape == shape and x.dtype == dtype and x.isfinite().all()
    steps = seen[2:]  # after the two questions, of one image and of two
    assert set(steps) <= {(torch.Size(shape), dtype, (shape[0],), dtype)} and len(steps) == (5 if shape[0] else 0)


def test_k_diffusion_seeds():
    def run(x, seed=None):
        return kd.sample_ald(Blend(), x, karras(4), disable=True, seed=seed)

    x = x_at(10.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = run(x), run(x)
        torch.manual_seed(1)
        assert torch.equal(run(x), first) and not torch.equal(first, second)
    together = run(x, [7, 8, 9])
    assert all(torch.equal(run(x[i : i + 1], [7 + i])[0], together[i]) for i in range(3)), "a sample of its seed alone"
    assert not torch.equal(run(x, 7)[1], together[1])


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [([1.0], "at least two levels"), ([0.1, 1.0, 0.0], "descend"), ([1.0, 0.0, 0.0], "positive"), ([], "non-empty")],
)
def test_k_diffusion_bad_sigmas(sigmas, says):
    with pytest.raises(ValueError, match=says):
        kd.sample_ddim(Blend(), torch.zeros(1, *SHAPE), torch.tensor(sigmas), disable=True)


# -- EDM, EDM2: their calls --------------------------------------------------------------------------------------------


class OneGeneratorEach:
    """What EDM's programs pass: noise of each sample from its own generator."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def randn(self, size):
        return torch.stack([torch.randn(size[1:], generator=g) for g in self.generators])

    def randn_like(self, x):
        return self.randn(x.shape)


def edm_images(numbers, net=None, labels=None, **options):
    each = OneGeneratorEach(numbers)
    latents = each.randn((len(numbers), *SHAPE))
    return edm.sampler_fn(net or Blend(), latents, labels, randn_like=each.randn_like, num_steps=5, **options)


def test_edm_a_seed_is_an_image():
    together = edm_images([3, 4, 5])
    assert torch.equal(edm_images([4])[0], together[1]) and torch.equal(edm_images([5, 3])[1], together[0])
    assert not torch.equal(together[0], together[1])


def test_edm2_calls_with_other_names():
    labels, net, guide = torch.tensor([0.3, -0.2]), Blend(), Blend()
    with torch.no_grad():
        guide.mean.fill_(-1.0)
    each = OneGeneratorEach([1, 2])
    noise = each.randn((2, *SHAPE))
    got = edm.sampler_fn(
        net=net, noise=noise, labels=labels, gnet=guide, guidance=1.5, randn_like=each.randn_like, num_steps=5
    )

    def guided(x, sigma, labels=None):
        return guide(x, sigma, labels) + 1.5 * (net(x, sigma, labels) - guide(x, sigma, labels))

    torch.testing.assert_close(got, edm_images([1, 2], guided, labels), rtol=1e-4, atol=1e-5)


def test_edm_euler_and_schedule():
    """plan=ddim is the deterministic sampler of EDM without its second-order correction; float64 like its latents."""
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    got = edm.sampler_fn(Blend(), latents, num_steps=8, sigma_max=20, plan=ddim)
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64)
    t = (20 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 20 ** (1 / 7))) ** 7
    x = latents * t[0]
    for now, after in zip(t, [*t[1:], 0], strict=True):
        x = x + (after - now) * (x - Blend()(x, now)) / now
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, x.detach(), rtol=1e-4, atol=1e-4)


def test_edm_sigmas_are_the_networks():
    class Rounded(Blend):
        sigma_min, sigma_max = 0.05, 3.0

        def round_sigma(self, sigma):
            return torch.as_tensor(sigma, dtype=torch.float32).mul(100).round() / 100

    seen = []
    net = Rounded()
    net.register_forward_pre_hook(lambda _, args: seen.append(round(float(args[1][0]), 6)))
    edm.sampler_fn(net, torch.zeros(1, *SHAPE), num_steps=4, plan=ddim)
    assert seen[0] == 3.0 and seen[-1] == 0.05 and all(round(s * 100, 4) == round(s * 100) for s in seen)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(), "latents .EDM. or noise"),
        (dict(latents=torch.zeros(1, *SHAPE), noise=torch.zeros(1, *SHAPE)), "pass one of them"),
        (dict(latents=torch.zeros(1, *SHAPE), class_labels=1, labels=1), "class_labels"),
        (dict(latents=torch.zeros(1, *SHAPE), guidance=2.0), "needs gnet"),
        (dict(latents=torch.zeros(1, *SHAPE), randn_like=torch.zeros_like), "randn_like"),
    ],
)
def test_edm_bad_calls(arguments, says):
    with pytest.raises(ValueError, match=says):
        edm.sampler_fn(Blend(), **arguments)


# -- azula -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["VESchedule", "VPSchedule", "RectifiedSchedule"])
def azula_denoiser(request):
    real = pytest.importorskip("azula.denoise", reason=AZULA)
    schedule = getattr(pytest.importorskip("azula.noise", reason=AZULA), request.param)()
    return real.KarrasDenoiser(Blend0(), schedule) if request.param != "VESchedule" else _gaussian(real, schedule)


class Blend0(nn.Module):
    """A backbone for azula: anything smooth of (x, time)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, **_):
        return torch.tanh(self.w * x + 0.01 * t.reshape(-1, *(1,) * (x.dim() - 1)))


def _gaussian(real, schedule):
    linalg = pytest.importorskip("azula.linalg.covariance", reason=AZULA)
    return real.GaussianDenoiser(torch.full((2,), 0.5), linalg.IsotropicCovariance(torch.tensor(1.0)), schedule)


def test_azula_ddim_is_its_own(azula_denoiser):
    """Azula's DDIM up to the last level, then its denoiser once, is our DDIM, which ends without noise."""
    sample = pytest.importorskip("azula.sample", reason=AZULA)
    ours = azula.PlanSampler(azula_denoiser, ddim, start=0.9, stop=0.1, steps=8, silent=True)
    last = float(ours.timesteps[-2])
    theirs = sample.DDIMSampler(azula_denoiser, start=0.9, stop=last, steps=7, silent=True, dtype=torch.float64)
    _, sigma = azula_denoiser.schedule(torch.tensor(0.9))
    x = (sigma * torch.randn(4, 2, generator=torch.Generator().manual_seed(0))).float()
    want = azula_denoiser(theirs(x.double()).float(), torch.tensor(last)).mean
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)


def test_azula_interface(azula_denoiser):
    base = pytest.importorskip("azula.sample", reason=AZULA).Sampler
    for name in ("init", "__call__"):
        ours = list(inspect.signature(getattr(azula.PlanSampler, name)).parameters)
        assert ours == list(inspect.signature(getattr(base, name)).parameters)
    sampler = azula.ALDSampler(azula_denoiser, steps=6, silent=True, seed=[1, 2, 3])
    x = sampler.init((3, 2))
    alpha, sigma = azula_denoiser.schedule(torch.tensor(1.0))
    again = azula.ALDSampler(azula_denoiser, steps=6, silent=True, seed=[3])
    assert torch.equal(again.init((1, 2))[0], x[2]) and sampler(x).shape == (3, 2)
    assert (sampler.init((3, 2), mean=5.0) - x).sub(5.0 * float(alpha)).abs().max() < 1e-4 * float(sigma)


def test_azula_draws_the_gaussian():
    """Data N(½, 1), through azula's exact denoiser: the mean and the variance that the plan's rows have on it."""
    real = pytest.importorskip("azula.denoise", reason=AZULA)
    denoiser = _gaussian(real, pytest.importorskip("azula.noise", reason=AZULA).VESchedule(1e-2, 1e2))
    sampler = azula.PlanSampler(denoiser, ancestral, steps=40, silent=True, seed=4)
    x = sampler(sampler.init((4096, 2), mean=0.5))
    plan = ancestral(denoiser.schedule(sampler.timesteps[:-1])[1])
    variance = 1 + plan.sigma[0] ** 2  # of the distance to the data's mean
    for sigma, a, b, c in zip(plan.sigma, plan.a, plan.b, plan.c, strict=True):
        variance = (a - b / (1 + sigma**2)) ** 2 * variance + c**2
    n = x.numel()
    assert abs(float(x.mean()) - 0.5) < 5 * (variance / n) ** 0.5
    assert abs(float(x.var()) / variance - 1) < 5 * (2 / n) ** 0.5


# -- deepinv -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN([1.0, 0.5, 0.25, 0.125], channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()


def test_deepinv_score_prior_gives_the_networks_score(net):
    real = real_deepinv()
    prior = real.optim.ScorePrior(deepinv.Denoiser(net))
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(prior.score(x, 0.5), net(x, torch.full((3,), 1)), rtol=1e-4, atol=1e-4)


def test_deepinv_plug_and_play_and_langevin(net):
    real = real_deepinv()
    physics = real.physics.Denoising(real.physics.GaussianNoise(0.1))
    y = physics(torch.rand(2, 1, 8, 8))
    denoiser = deepinv.Denoiser(net)
    x = real.optim.PGD(
        data_fidelity=real.optim.L2(), prior=real.optim.PnP(denoiser), stepsize=0.5, sigma_denoiser=0.2, max_iter=3
    )(y, physics)
    assert x.shape == y.shape and x.isfinite().all() and not torch.equal(x, y)


def test_deepinv_denoiser(net):
    denoiser, x = deepinv.Denoiser(net), torch.rand(3, 1, 8, 8)
    sigma = torch.tensor([1.0, 0.26, 0.125])
    with torch.no_grad():
        native = denoiser(x, sigma)
        plain = x + sigma.reshape(-1, 1, 1, 1) ** 2 * net(x, torch.tensor([0, 2, 3]))
        torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
        assert denoiser._fast.network is not None
        torch.testing.assert_close(denoiser(x, 0.5), denoiser(x, sigma.new_full((3,), 0.5)), rtol=0, atol=0)
    image = x.clone().requires_grad_()
    denoiser(image, 0.5).square().sum().backward()
    assert image.grad.abs().sum() > 0 and net.begin_conv.weight.grad is not None
    net.zero_grad()


def test_deepinv_denoiser_follows_the_weights(net):
    import copy

    mine = copy.deepcopy(net)
    denoiser, x = deepinv.Denoiser(mine), torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        before = denoiser(x, 0.5)
        mine.begin_conv.weight.mul_(1.5)
        assert not torch.equal(denoiser(x, 0.5), before)


def test_deepinv_denoiser_looks_at_a_network_once(monkeypatch):
    """Traced for one size of images; again when the model has become another; never stale."""
    from tests.mutations import LEVELS, SHAPE, Model

    made, real = [], deepinv.NativeNetwork
    monkeypatch.setattr(deepinv, "NativeNetwork", lambda *a, **b: made.append(1) or real(*a, **b))
    model = Model(0, "open").eval()
    denoiser, x = deepinv.Denoiser(model), torch.rand(2, *SHAPE)

    def right():
        want = x + LEVELS[1] ** 2 * model(x, torch.tensor([1, 1]))
        torch.testing.assert_close(denoiser(x, LEVELS[1]), want, rtol=1e-4, atol=1e-4)
        return len(made)

    with torch.no_grad():
        assert [right(), right(), right()] == [1, 1, 1]
        model.config.scale = 0.0
        assert right() == 2
        model.last.register_forward_hook(lambda m, a, out: out * 2)
        assert [right(), right()] == [3, 3] and denoiser._fast.network is None
        monkeypatch.setattr(deepinv.Observed, "changed", lambda self: None)
        model.last._forward_hooks.clear()
        other = deepinv.Denoiser(model)
        other(x, LEVELS[1])
        model.gain, other._fast.due, denoiser = 3.0, 0, other  # what no record sees is found when it is compared next
        assert [right(), right()] == [5, 5]


@pytest.mark.parametrize("sigma", [2.0, 0.05, 0.0, float("nan"), torch.tensor([0.5, 9.0])])
def test_deepinv_sigma_out_of_range(net, sigma):
    with pytest.raises(ValueError, match=r"trained from 0\.125 to 1"):
        deepinv.Denoiser(net)(torch.rand(2, 1, 8, 8), sigma)


def test_deepinv_bad_arguments(net):
    with pytest.raises(ValueError, match="pass sigmas"):
        deepinv.Denoiser(lambda x, level: x)
    with pytest.raises(ValueError, match="one for each of 2 images, got 3"):
        deepinv.Denoiser(net)(torch.rand(2, 1, 8, 8), [0.5, 0.5, 0.5])


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_seeds_from_generators():
    def g(seed):
        return torch.Generator().manual_seed(seed)

    assert seeds(None, 2, g(1)) == seeds(None, 5, g(1)) != seeds(None, 2, g(2))
    assert seeds(None, 2, [g(1), g(2)]) == [seeds(None, 1, g(1)), seeds(None, 1, g(2))]
    one = g(1)
    assert seeds(None, 1, one) != seeds(None, 1, one), "a generator moves on"
    assert seeds(7, 3) == 7 and seeds((1, 2), 2) == [1, 2]
    with pytest.raises(ValueError, match="list of 3, got 2"):
        seeds(None, 3, [g(1), g(2)])
