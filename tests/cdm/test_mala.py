"""Metropolis-adjusted Langevin: the stationary law is exact where the plain chain's is not."""

import numpy as np
import pytest
import torch

from sgm_engine import Engine, Plan, annealed_langevin, ddim
from sgm_engine.cdm import metropolis as module
from sgm_engine.cdm.metropolis import Density, mala

N, ROWS, STEP = 40_000, 30, 0.4  # x + .4·s + √.8·z on N(0, 1): variance 1/(1 − .8/4) = 1.25


def gaussian(x, sigma):
    return -0.5 * x.flatten(1).square().sum(1)


def langevin(rows=ROWS, step=STEP, sigma=1.0):
    ones = np.ones(rows)
    return Plan(np.zeros(rows, int), sigma * ones, ones, step * ones, np.sqrt(2 * step) * ones, start="normal")


def test_a_gaussian_keeps_its_variance():
    model = Density(gaussian, [1.0], (1, 1, 1))
    plain = Engine(model, batch=N).sample(N, plan=langevin())
    adjusted = mala(model, langevin(), N)
    print(f"plain {plain.var():.3f}, adjusted {adjusted.x.var():.3f}, acceptance {adjusted.acceptance[-1]:.3f}")
    assert abs(plain.var() - 1.25) < 0.03
    assert abs(adjusted.x.var() - 1.00) < 0.02 and abs(adjusted.x.mean()) < 0.02
    assert 0.85 < adjusted.acceptance[-1] < 0.95  # by quadrature .9055
    # the fourth moment as well: 3 for a normal law
    assert abs(adjusted.x.double().pow(4).mean() - 3) < 0.15


def test_the_acceptance_is_the_exact_one():
    """∫∫ N(x; 0, 1)·N(x'; (1 − b)·x, 2b)·min(1, ratio) dx dx', on a grid."""
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    x, y = grid[:, None], grid[None]
    forth, back = (y - (1 - STEP) * x) ** 2 / (4 * STEP), (x - (1 - STEP) * y) ** 2 / (4 * STEP)
    log_p, log_q = -(x**2) / 2, -(y**2) / 2
    weight = torch.exp(log_p - forth) / (2 * np.pi * np.sqrt(2 * STEP)) * 0.01**2
    exact = (weight * torch.exp((log_q - log_p + forth - back).clamp(max=0))).sum().item()
    found = mala(Density(gaussian, [1.0], (1, 1, 1)), langevin(1), N).acceptance[0]
    assert abs(found - exact) < 4 * (exact * (1 - exact) / N) ** 0.5


def test_a_chain_that_is_always_taken_is_the_engine_s(monkeypatch):
    model = Density(gaussian, [1.0], (2, 3, 3))
    plan = langevin(rows=5, step=1e-6)
    found = mala(model, plan, 7, seed=3, first_id=11)
    assert (found.acceptance == 1).all()
    assert found.x.equal(Engine(model, batch=7).sample(7, seed=3, plan=plan, first_id=11))


def test_samples_are_their_own():
    """Sample i does not depend on the others, and a start can be given."""
    model = Density(gaussian, [1.0], (1, 1, 2))
    many = mala(model, langevin(), 9, seed=5).x
    assert mala(model, langevin(), 2, seed=5, first_id=6).x.equal(many[6:8])
    init = torch.full((3, 1, 1, 2), 2.0)
    moved = mala(model, langevin(1, 1e-9), 3, init=init).x
    assert torch.allclose(moved, init, atol=1e-3)
    assert mala(model, langevin(), 0).x.shape == (0, 1, 1, 2)


def test_annealed_with_a_final_denoising():
    """Two levels and a row without noise: levels change the energy, and what proposes nothing reports nothing."""

    def log_prob(x, sigma):
        return -0.5 * x.flatten(1).square().sum(1) / (1 + sigma**2)

    model = Density(log_prob, [1.0, 0.5], (1, 1, 1))
    plan = annealed_langevin(model.sigmas, steps_per_level=12, step_lr=0.35, start="normal")
    found = mala(model, plan, N)
    assert np.isnan(found.acceptance[-1]) and (found.acceptance[:-1] > 0.5).all()
    assert found.acceptance[0] < found.acceptance[12]  # .70 and .28 of what the variance allows
    expected = 1.25 * (1 - 0.25 / 1.25) ** 2  # x + σ²·score = x·(1 − σ²/(1 + σ²)) of variance 1 + σ²
    assert abs(found.x.var() - expected) < 0.02 * expected


def test_what_is_refused():
    model = Density(gaussian, [1.0], (1, 1, 1))
    with pytest.raises(ValueError, match=r"plan row 0 is no Langevin step.*take annealed_langevin"):
        mala(Density(gaussian, [1.0, 0.5], (1, 1, 1)), Plan([0, 1], [1, 0.5], [1, 1], [0.3, 0.1], [0.2, 0.1]), 4)
    with pytest.raises(ValueError, match=r"plan row 0 has sigma 3 at level 0, which is not the model's"):
        mala(model, langevin(sigma=3.0), 4)
    with pytest.raises(TypeError, match="has no energies"):
        mala(torch.nn.Identity(), langevin(), 4)
    with pytest.raises(ValueError, match=r"log_prob must return one value a sample, \[4\], got \[4, 1\]"):
        mala(Density(lambda x, sigma: x.flatten(1), [1.0], (1, 1, 1)), langevin(), 4)
    with pytest.raises(ValueError, match="no Langevin step"):
        mala(Density(gaussian, [1.0, 0.5], (1, 1, 1)), ddim([1.0, 0.5], eta=1.0), 4)


def test_a_proposal_that_is_not_finite_is_refused(monkeypatch):
    def cliff(x, sigma):
        flat = x.flatten(1)
        return torch.where(flat[:, 0] > 0.5, torch.nan, -0.5 * flat.square().sum(1))

    found = mala(Density(cliff, [1.0], (1, 1, 1)), langevin(), 500, init=torch.zeros(500, 1, 1, 1))
    assert found.x.isfinite().all() and found.x.max() <= 0.5


@pytest.mark.parametrize("outside", [-torch.inf, torch.nan])
def test_a_start_outside_the_support_is_refused(outside):
    """On [0, ∞) half of all chains of a plain start could never move."""

    def half_line(x, sigma):
        flat = x.flatten(1)[:, 0]
        return torch.where(flat < 0, outside, -0.5 * flat**2)

    model = Density(half_line, [1.0], (1, 1, 1))
    init = torch.tensor([1.0, -1.0, 2.0, -0.5]).view(4, 1, 1, 1)
    with pytest.raises(ValueError, match=r"2 of 4 chains, such as sample 11, begin level 0 where log q .*init="):
        mala(model, langevin(), 4, first_id=10, init=init)
    moved = mala(model, langevin(), 4, first_id=10, init=init.abs()).x
    assert (moved != init.abs()).all() and (moved >= 0).all()


def test_streams_are_apart():
    assert len(set(module.STREAM.values())) == len(module.STREAM)
