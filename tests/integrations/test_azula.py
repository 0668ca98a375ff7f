"""The azula adapter against azula."""

import inspect

import pytest
import torch
from torch import nn

from sgm_engine.integrations import azula
from sgm_engine.plans.plan import ancestral, ddim

AZULA = "pip install --no-deps azula, and einops"


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
