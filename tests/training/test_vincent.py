"""Vincent's equivalences, to rounding: one energy model, five objectives, one gradient (SPEC: float64 on a grid)."""

from functools import partial

import pytest
import torch

from sgm_engine.training import objectives
from sgm_engine.training.vincent import EnergyModel, Quadrature

SIGMA, DIM = 0.5, 2
POINTS = torch.tensor(
    [[0.0, 0.0], [1.0, 0.5], [-0.8, 1.1], [0.3, -1.2], [-1.4, -0.6], [1.5, 1.5], [0.7, -0.4]], dtype=torch.float64
)
GRID = Quadrature(POINTS, SIGMA)
OBJECTIVES = {
    "ESM": (partial(objectives.explicit, score=GRID.score), 1),
    "ISM": (objectives.implicit, 1),
    "DSM": (objectives.denoising, 1),
    # the trainer's autoencoder objective carries no λ; expectation() divides by σ² all the same
    "DAE": (objectives.denoising_autoencoder, SIGMA**2),
    "SSM": (partial(objectives.sliced, projections=2), 1),
}


def value_and_gradient(name, seed):
    objective, factor = OBJECTIVES[name]
    model = EnergyModel(DIM, 5, SIGMA, seed)
    j = factor * GRID.expectation(objective, model)
    gradient = torch.autograd.grad(j, list(model.parameters()))
    return j.item(), torch.cat([g.flatten() for g in gradient])


def test_the_score_is_minus_the_gradient_of_the_energy():
    model, x = EnergyModel(DIM, 5, SIGMA), POINTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.energy(x).sum(), x)
    score = model(x, torch.zeros(7, dtype=torch.int64))
    torch.testing.assert_close(score, -gradient, rtol=0, atol=1e-13)
    torch.testing.assert_close(x + SIGMA**2 * score, model.reconstruct(x), rtol=0, atol=1e-13)


def test_the_grid_integrates():
    """Mass, mean and second moment of q_σ."""
    assert GRID.weight.sum().item() == pytest.approx(1, abs=1e-13)
    x = GRID.x + SIGMA * GRID.z
    torch.testing.assert_close(GRID.weight @ x, POINTS.mean(0), rtol=0, atol=1e-13)
    second = (GRID.weight * x.square().sum(1)).sum().item()
    assert second == pytest.approx(POINTS.square().sum(1).mean().item() + DIM * SIGMA**2, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_agree(seed):
    _, reference = value_and_gradient("ESM", seed)
    assert reference.abs().max() > 0.1
    for name, factor in {"ISM": 1, "DSM": 1, "DAE": 1 / (2 * SIGMA**4), "SSM": 1}.items():
        _, gradient = value_and_gradient(name, seed)
        torch.testing.assert_close(factor * gradient, reference, rtol=0, atol=1e-12)


def test_constants_are_the_same_for_any_parameters():
    zero = torch.zeros(len(GRID.x), dtype=torch.int64)
    c = 0.5 * (GRID.weight * GRID.score(GRID.x + SIGMA * GRID.z, zero).square().sum(1)).sum().item()
    for seed in range(3):
        j = {name: value_and_gradient(name, seed)[0] for name in OBJECTIVES}
        assert j["DSM"] == pytest.approx(j["DAE"] / (2 * SIGMA**4), abs=1e-11)
        assert j["DSM"] == pytest.approx(j["ESM"] + DIM / (2 * SIGMA**2) - c, abs=1e-11)
        assert j["ISM"] == pytest.approx(j["ESM"] - c, abs=1e-11)
        assert j["SSM"] == pytest.approx(j["ISM"], abs=1e-11)


def test_another_noise_level_is_noticed():
    """The control: an autoencoder trained at another σ than q_σ's has another gradient."""
    model = EnergyModel(DIM, 5, 1.1 * SIGMA, 0)
    other = Quadrature(POINTS, 1.1 * SIGMA).expectation(objectives.denoising, model)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(other, list(model.parameters()))])
    assert (gradient - value_and_gradient("ESM", 0)[1]).abs().max() > 1e-2
