"""Energies as a kind: their score, training through the gradient, Metropolis, and Vincent's model at several levels."""

from functools import partial

import pytest
import torch

from sgm_engine import Engine, annealed_langevin
from sgm_engine.cdm.metropolis import Density, mala
from sgm_engine.keys import Key
from sgm_engine.models.score_model import as_score
from sgm_engine.training import objectives
from sgm_engine.training.module import ScoreModule
from sgm_engine.training.toy import TRIPLE, EnergyMLP, ScoreMLP, gap
from sgm_engine.training.vincent import EnergyModel

SIGMAS = [2.0, 1.0, 0.5, 0.2]


def exact(shape=(1, 1, 2)):
    """The mixture's own energies, off by a number of each level."""
    sigmas = torch.tensor(SIGMAS)

    def energy(x, level):
        return (7.0 * level - TRIPLE.log_prob(x, sigmas[level]))[:, None]

    energy.shape = shape
    return as_score(energy, "energy", sigmas=SIGMAS)


def test_the_score_of_an_energy():
    x, level = TRIPLE.sample(Key(0, torch.arange(20))), torch.arange(20) % 4
    sigma = torch.tensor(SIGMAS)[level]
    score = exact()(x.float().view(20, 1, 1, 2), level).flatten(1)
    torch.testing.assert_close(score, TRIPLE.score(x.float(), sigma), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        value, found = exact().log_q_and_score(x, level)
    torch.testing.assert_close(value, TRIPLE.log_prob(x, sigma) - 7 * level, rtol=0, atol=1e-12)
    assert not found.requires_grad and not value.requires_grad and found.dtype == torch.float64


def test_the_engine_draws_from_energies():
    """Bit for bit what it draws from their gradient given as a score."""
    model = exact()
    plan = annealed_langevin(SIGMAS, 4, 0.05, start="normal", start_scale=2.0)
    score = as_score(lambda x, level: model(x, level).detach(), sigmas=SIGMAS)
    found = Engine(model, 8).sample(12, seed=1, plan=plan)
    assert torch.equal(found, Engine(score, 8, shape=(1, 1, 2)).sample(12, seed=1, plan=plan))


def test_metropolis_on_energies():
    """What mala draws from the density itself, whatever number is added at each level."""
    plan = annealed_langevin(SIGMAS, 4, 0.02, start="normal", start_scale=2.0, denoise=False)
    own = mala(exact(), plan, 200, seed=3)
    density = mala(Density(TRIPLE.log_prob, SIGMAS, (1, 1, 2)), plan, 200, seed=3)
    assert own.acceptance == pytest.approx(density.acceptance, abs=0.011)  # a draw on the edge, in float32
    assert ((own.x - density.x).flatten(1).norm(dim=1) < 1e-3).double().mean() > 0.97
    assert 0.3 < own.acceptance.mean() < 0.999


@pytest.mark.parametrize("found", [(3, 1, 1, 2), (3, 2), (1,), (1, 3)])
def test_what_is_no_energy(found):
    model = as_score(lambda x, level: torch.zeros(found), "energy", sigmas=SIGMAS)
    with pytest.raises(ValueError, match=r"model must return one energy a sample, \[3\] or \[3, 1, …\], got \["):
        model(torch.zeros(3, 1, 1, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"as_score\(model, kind='energy'\) makes a score of an energy"):
        as_score(lambda x, level: x.flatten(1).sum(1), sigmas=SIGMAS)(torch.zeros(3, 1, 1, 2), torch.zeros(3).long())


OBJECTIVES = {
    "denoising": {},
    "explicit": {"score": lambda x, level: TRIPLE.score(x, torch.tensor(SIGMAS)[level])},
    "implicit": {},
    "sliced": {"directions": "rademacher"},
    "denoising_autoencoder": {},
    "stable_target": {},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_a_loss_through_the_gradient(name):
    """∂loss/∂θ of an energy network against central differences, float64."""
    network = EnergyMLP(SIGMAS, width=5).double()
    model = as_score(network, "energy")
    model.sigmas = model.sigmas.double()
    x, levels = TRIPLE.sample(Key(3, torch.arange(8))), torch.arange(8) % 4
    loss = partial(getattr(objectives, name), model, x, levels, Key(1, torch.arange(8)), **OBJECTIVES[name])
    weight = network.layers[2].weight
    (gradient,) = torch.autograd.grad(loss(), weight)
    for i, j in ((0, 0), (3, 1)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[i, j] += step
            values.append(loss().item())
            with torch.no_grad():
                weight[i, j] -= step
        assert gradient[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_an_energy_network_learns():
    """300 steps of denoising: as good a score as the network of scores of the same size, within a half."""
    key, gaps = Key(11, torch.arange(4096)), {}
    for name, model in {"energy": as_score(EnergyMLP(SIGMAS), "energy"), "score": ScoreMLP(SIGMAS)}.items():
        module = ScoreModule(model)
        adam = torch.optim.Adam(module.parameters(), 5e-3)
        assert len(list(module.parameters())) == 6
        for t in range(300):
            ids = torch.arange(128 * t, 128 * t + 128)
            adam.param_groups[0]["lr"] = 5e-3 * (1 - t / 300)
            adam.zero_grad()
            module.loss(TRIPLE.sample(Key(5, ids)).float(), ids).backward()
            adam.step()
        gaps[name] = gap(model, TRIPLE, key)
    print(gaps)
    assert gaps["energy"] < 0.13 and gaps["energy"] < 1.5 * gaps["score"]


# -- Vincent's model ---------------------------------------------------------------------------------------------------


def test_vincents_model_at_levels_and_in_any_dimension():
    """ψ = −∂E/∂x for images; each level is the model of one level with its own b and c; J_DAE = 2σ²·J_DSM at each."""
    model = EnergyModel(12, 7, [1.0, 0.5, 0.1], seed=2)
    x, level = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
    value, psi = model.log_q_and_score(x, level)
    torch.testing.assert_close(psi, as_score(model.energy, "energy", sigmas=model.sigmas)(x, level), rtol=0, atol=1e-10)
    for i in range(3):
        one = EnergyModel(12, 7, model.sigmas[i].item())
        state = {"W": model.W, "b": model.b[i : i + 1], "c": model.c[i : i + 1], "sigmas": model.sigmas[i : i + 1]}
        one.load_state_dict(state)
        at = level == i
        torch.testing.assert_close(-one.energy(x[at]), value[at], rtol=0, atol=1e-10)
        torch.testing.assert_close(one(x[at], torch.zeros(2, dtype=torch.int64)), psi[at], rtol=0, atol=1e-10)
    key = Key(0, torch.arange(6))
    dae, dsm = (
        f(model, x, level, key, reduction="none") for f in (objectives.denoising_autoencoder, objectives.denoising)
    )
    torch.testing.assert_close(dae, 2 * model.sigmas[level] ** 2 * dsm, rtol=1e-10, atol=0)


def test_vincents_model_draws():
    """At one level exp(−E) is a density: Metropolis keeps it, and its mean is that of a quadrature."""
    model = EnergyModel(2, 3, 0.5, seed=1)
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    weight = (-model.energy(grid)).softmax(0)
    plan = annealed_langevin([0.5], 400, 0.02, start="normal", start_scale=2.0, denoise=False)
    with torch.no_grad():
        found = mala(model, plan, 2000, seed=1)
    std = (weight @ grid.square() - (weight @ grid) ** 2).sqrt()
    assert ((found.x.flatten(1).mean(0) - weight @ grid).abs() < 5 * std / 2000**0.5).all()
