"""The mathematics of classification diffusion, with exact classifiers (SPEC.md §5), and what trains on it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sgm_engine.evaluation.likelihood import bits_per_dim
from sgm_engine.keys import Key
from sgm_engine.models.cdm import classes as schedules
from sgm_engine.models.cdm.classes import NoiseClasses
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.networks import MLP, Head, UNet
from sgm_engine.training.cdm_objective import cdm, parts
from sgm_engine.training.toy import TRIPLE

T50 = schedules.ddpm(50, 0.002, 0.4)
ALL = {
    "ddpm": T50,
    "ddpm-200": schedules.ddpm(200),
    "uniform": schedules.uniform(40),
    "flow": schedules.flow(40),
    "vp": schedules.vp_geometric(30, 10.0, 0.05),
    "ve": schedules.ve_geometric(30, 10.0, 0.05),
    "ve, another reference": schedules.ve_geometric(30, 10.0, 0.05, reference=4.0),
}


class Exact(nn.Module):
    """log p_t(u) + log π_t + c(u) of the mixture in the plane: what a perfect classifier's logits are."""

    def __init__(self, classes: NoiseClasses, prior=None):
        super().__init__()
        self.classes = classes
        self.log_prior = torch.tensor(np.log(np.ones(len(classes.signal)) if prior is None else prior))

    def log_densities(self, u):
        columns = [log_density(u, a, s) for a, s in zip(self.classes.signal, self.classes.noise, strict=True)]
        return torch.stack(columns, 1)

    def forward(self, u):
        anything = u.flatten(1).sum(1, keepdim=True).sin() * 3
        return self.log_densities(u) + self.log_prior + anything


def log_density(u, signal, noise):
    """log density of signal·data + noise·ε at u [N, 2], written out."""
    mean, variance = signal * TRIPLE.means, signal**2 * TRIPLE.stds**2 + noise**2
    square = (u.flatten(1)[:, None] - mean).square().sum(2)
    return (TRIPLE.weights.log() - square / (2 * variance) - torch.log(2 * math.pi * variance)).logsumexp(1)


def posterior_noise(u, signal, noise):
    """E[ε | u], component by component: no gradient in it."""
    mean, variance = signal * TRIPLE.means, signal**2 * TRIPLE.stds**2 + noise**2
    away = u.flatten(1)[:, None] - mean  # [N, K, 2]
    weight = (TRIPLE.weights.log() - away.square().sum(2) / (2 * variance) - variance.log()).softmax(1)
    return (weight[:, :, None] * (noise / variance)[:, None] * away).sum(1).view(u.shape)


def priors(count):
    rising = np.linspace(1, 3, count)
    return {"uniform": None, "any": rising / rising.sum()}


def points(n=200, seed=3):
    return TRIPLE.sample(Key(seed, torch.arange(n)))


@pytest.mark.parametrize("prior", ["uniform", "any"])
@pytest.mark.parametrize("name", ALL)
def test_an_exact_classifier_gives_the_exact_noise(name, prior):
    classes = ALL[name]
    prior = priors(classes.levels + 2)[prior]
    model = CDM(Exact(classes, prior), classes, prior=prior)
    t = torch.arange(200) % (classes.levels + 2)
    signal, noise = (torch.tensor(v)[t][:, None] for v in (classes.signal, classes.noise))
    u = signal * points() + noise * Key(1, torch.arange(200)).normal(points())
    found, _ = model.noise_pred(u, t)
    exact = torch.stack([posterior_noise(u[i : i + 1], signal[i], noise[i])[0] for i in range(200)])
    assert (found - exact).abs().max() < 1e-12


@pytest.mark.parametrize("prior", ["uniform", "any"])
@pytest.mark.parametrize("name", ALL)
def test_an_exact_classifier_gives_the_exact_density_of_data(name, prior):
    classes = ALL[name]
    prior = priors(classes.levels + 2)[prior]
    model = CDM(Exact(classes, prior), classes, prior=prior)
    assert (model.log_prob(points()) - TRIPLE.log_prob(points())).abs().max() < 1e-12


@pytest.mark.parametrize("prior", ["uniform", "any"])
@pytest.mark.parametrize("name", ALL)
def test_score_and_energy_of_every_level(name, prior):
    """What an engine and a Metropolis step ask for, in the notation data + σ·noise, in the user's units of x."""
    classes = ALL[name]
    prior = priors(classes.levels + 2)[prior]
    # x in other units than u: u₀ = 2·x − 1
    model = CDM(Exact(classes, prior), classes, prior=prior, scale=2.0, shift=-1.0)
    sigmas = torch.tensor(classes.sigmas / 2)
    assert torch.allclose(model.sigmas.double(), sigmas, rtol=1e-6)
    level = torch.arange(200) % classes.levels
    sigma = sigmas[level]
    x = (points() + 1) / 2 + sigma[:, None] * Key(1, torch.arange(200)).normal(points())
    value, score = model.log_q_and_score(x, level)
    u = 2 * x - 1
    assert (value - (TRIPLE.log_prob(u, 2 * sigma) + 2 * math.log(2))).abs().max() < 1e-12
    exact = 2 * TRIPLE.score(u, 2 * sigma)
    assert ((score - exact).abs().amax(1) * sigma).max() < 1e-12
    assert torch.equal(model(x, level), score)


def test_bits_per_dim_are_those_of_minus_one_to_one():
    classes = T50
    u = points(8)
    of_u = bits_per_dim(CDM(Exact(classes), classes).log_prob(u), 2, bins=128)  # [−1, 1] in 256 grey levels
    of_x = bits_per_dim(CDM(Exact(classes), classes, scale=2.0, shift=-1.0).log_prob((u + 1) / 2), 2)
    assert torch.allclose(of_u, -TRIPLE.log_prob(u) / (2 * math.log(2)) + 7)
    assert torch.allclose(of_u, of_x)


def test_the_second_derivative_of_the_density_is_there_when_asked_for():
    model = CDM(Exact(T50), T50)
    x = points(5).requires_grad_()
    score = model(x, torch.arange(5))
    (along,) = torch.autograd.grad(score[:, 0].sum(), x)
    h = 1e-5
    step = torch.tensor([[h, 0.0]])
    shifted = (model(x.detach() + step, torch.arange(5)) - model(x.detach() - step, torch.arange(5))) / (2 * h)
    assert torch.allclose(along[:, 0], shifted[:, 0], rtol=1e-5)
    with torch.no_grad():
        assert not model(x, torch.arange(5)).requires_grad


def test_levels_can_be_chosen():
    model = CDM(Exact(T50), T50, shape=(1, 1, 2))
    few = model.at_sigmas(model.sigmas[::10])
    assert few.sigmas.equal(model.sigmas[::10]) and few.shape == (1, 1, 2)
    x = points(5)
    assert few(x, torch.arange(5)).equal(model(x, 10 * torch.arange(5)))
    with pytest.raises(ValueError, match=r"none of this classifier's levels.*on_levels"):
        model.at_sigmas([1.2345, 0.1])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: schedules.ddpm(0), "levels must be an integer >= 1, got 0"),
        (lambda: schedules.ddpm(5, 0.5, 0.1), "beta_min <= beta_max"),
        (lambda: schedules.ve_geometric(5, reference=-1.0), "reference must be a positive"),
        (lambda: NoiseClasses([1, 0.5, 0.2, 0], [0, 1, 1]), "one length, got 4 and 3"),
        (lambda: NoiseClasses([1, 0.5, 0.1], [0, 1, 1]), r"reference, got"),
        (lambda: NoiseClasses([1, 0.5, 0.6, 0], [0, 1, 1, 1]), "must rise"),
        (lambda: CDM(nn.Identity(), T50, prior=[1, 2]), "prior must hold 52"),
        (lambda: CDM(nn.Identity(), T50, scale=0), "scale must be positive"),
        (lambda: Head(4, T50, (0.0, 0.0)), "baseline must be"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_published_schedules():
    ddpm = schedules.ddpm()
    assert ddpm.levels == 1000 and math.isclose(ddpm.noise[1], 0.01)
    assert math.isclose(ddpm.signal[1000] ** 2, 4.0358e-5, rel_tol=1e-4)  # DDPM's ᾱ_T
    assert np.allclose(schedules.uniform(9).noise, np.arange(11) / 10)
    assert np.allclose(schedules.flow(9).signal, 1 - np.arange(11) / 10)
    assert np.allclose(ddpm.signal**2 + ddpm.noise**2, 1)


# Networks and training -----------------------------------------------------------------------------------------------


def test_an_untrained_head_with_a_baseline_is_that_gaussian():
    head = Head(3, T50, baseline=(0.3, 0.5)).double()
    model = CDM(lambda u: head(u.new_zeros(len(u), 3), u), T50)
    u = points(20)
    exact = torch.distributions.Normal(0.3, 0.5)
    assert torch.allclose(model.log_prob(u), exact.log_prob(u).sum(1), atol=1e-12)


def test_logits_are_summed_in_float32_under_autocast():
    net = UNet(1, 8, schedules.ddpm(300), width=8, multipliers=(1, 2), blocks=1, attention=(4,)).eval()
    nn.init.normal_(net.head.weight)
    x = torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    assert logits.dtype == torch.float32
    spread = logits.diff(dim=1)
    assert (logits - torch.cat([logits[:, :1], logits[:, :1] + spread.double().cumsum(1)], 1)).abs().max() < 1e-3


@pytest.mark.parametrize("patch, size", [(1, 32), (2, 28), (1, 28)])
def test_unet_gradient_against_differences(patch, size):
    options = dict(width=8, multipliers=(1, 2, 2), blocks=1, attention=(size // patch // 2,), fourier=(1,))
    net = UNet(2, size, schedules.ddpm(10), patch=patch, **options).double().eval()
    nn.init.normal_(net.head.weight)
    model = CDM(net, schedules.ddpm(10))
    u, t = torch.randn(2, 2, size, size, dtype=torch.float64), torch.tensor([2, 7])
    found, _ = model.noise_pred(u, t)
    v, h = torch.randn_like(u), 1e-6
    slope = (model.class_log_prob(u + h * v, t) - model.class_log_prob(u - h * v, t)) / (2 * h)
    assert torch.allclose(-(found * v).flatten(1).sum(1), model.noise[t] * slope, rtol=1e-5)
    single, _ = net.float() and CDM(net, schedules.ddpm(10)).noise_pred(u.float(), t)
    assert torch.allclose(single.double(), found, rtol=1e-3, atol=1e-4 * found.abs().max().item())


def test_the_objective_of_a_perfect_classifier():
    """CE is Bayes' error, the MSE what no ε̂ can beat; and any other classifier is worse."""
    n = 10_000
    key = Key(5, torch.arange(n))
    t = torch.arange(n) % 52
    ce, mse = parts(CDM(Exact(T50), T50), TRIPLE.sample(key), t, key.after(2))
    assert abs(ce.mean() - 3.8187) < 0.02
    loss = cdm(CDM(Exact(T50), T50), TRIPLE.sample(key), t, key.after(2), ce_weight=0.5, mse_weight=2.0)
    assert torch.allclose(loss, 0.5 * ce.mean() + 2 * mse.mean())
    worse = parts(CDM(lambda u: 0.9 * Exact(T50)(u), T50), TRIPLE.sample(key), t, key.after(2))
    assert worse[0].mean() > ce.mean() and worse[1].mean() > mse.mean()
    with pytest.raises(ValueError, match="not both 0"):
        cdm(CDM(Exact(T50), T50), TRIPLE.sample(key), t, key, ce_weight=0, mse_weight=0)


@pytest.fixture(scope="module")
def learned():
    """An MLP of 3×64 after 2,500 steps, as SPEC.md §5 has it."""
    from sgm_engine.cdm.ablation import train

    return train(MLP(2, T50), T50, steps=2500)


def test_a_learned_classifier_of_points(learned):
    key = Key(77, torch.arange(20_000))
    x = TRIPLE.sample(key).float()
    ce, _ = parts(learned, x, torch.arange(20_000) % 52, key.after(2))
    assert ce.mean() - 3.8187 < 0.02
    with torch.no_grad():
        nll = -learned.log_prob(x).mean()
    assert abs(nll - 1.1319) < 0.2


def test_a_learned_classifier_samples_in_the_right_shares(learned):
    from sgm_engine import Engine, ancestral
    from tests.cdm.test_cdm_sampling import check_shares

    model = CDM(learned.classifier, T50, (2, 1, 1))
    check_shares(Engine(model, batch=1000).sample(1000, plan=ancestral(model.sigmas)))


def test_the_package_s_names():
    import sgm_engine.cdm as package

    for name in package.__all__:
        assert callable(getattr(package, name)), name
    assert package.mala.__module__ == "sgm_engine.cdm.metropolis"
