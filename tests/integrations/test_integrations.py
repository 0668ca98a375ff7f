"""Adapters against the libraries themselves: signatures, results wherever both are deterministic, habits.

k-diffusion and deepinv run on their own code with empty torchvision modules where torchvision cannot be imported
(bench/stand_ins.py). EDM is no package: its calls are those of a network and a generator written here.
"""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from bench.stand_ins import k_diffusion as real_k_diffusion
from sgm_engine.integrations import k_diffusion as kd
from sgm_engine.kernels import noise
from tests.integrations.adapters import SHAPE, Blend


def karras(n, high=10.0, low=0.01, zero=True):
    s = torch.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7
    return torch.cat([s, s.new_zeros(1)]) if zero else s


def engine_noise(shape, seed, draw):
    z = noise.fill((shape[0], 1, 1, int(np.prod(shape[1:]))), [seed] * shape[0], np.arange(shape[0]), draw)
    return torch.from_numpy(z).reshape(shape)


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
