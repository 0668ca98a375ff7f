"""Skilling–Hutchinson likelihood: against exact densities of Gaussians and of the mixture, its order and its noise."""

import numpy as np
import pytest
import torch

from sgm_engine.evaluation.flow import _signs
from sgm_engine.evaluation.likelihood import log_likelihood
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.schedule import geometric, karras
from tests import mixture


def points(n=64):
    return mixture.start(n, 1, 1.0)  # N(0, 1) [n, 2, 1, 1]: near the modes and between them


def exact(x, sigma):
    v = (mixture.STD**2 + sigma**2)[None]
    squared = (mixture.MEAN[None] - x.flatten(1)[:, None]).square().sum(2)
    return torch.logsumexp(mixture.WEIGHT.log() - torch.log(2 * torch.pi * v) - squared / (2 * v), 1)


def error(levels, probes=None, seed=0):
    sigmas = karras(500, 0.1, levels)  # so far out the mean of the data does not show
    x = points()
    return log_likelihood(mixture.model(sigmas), x, probes, seed, sigmas=sigmas) - exact(x, 0.1)


def test_a_gaussian_and_its_prior():
    """Data N(.3, .5²): the flow is linear, and the exact prior at σ_1 leaves only Heun's error."""
    sigmas, mean, std = karras(5, 0.05, 400), 0.3, 0.5
    total = torch.tensor(sigmas**2 + std**2)
    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    prior = {"prior_mean": mean, "prior_std": total[0].sqrt().item()}

    def model(x, level):
        return ((mean - x) / total[level][:, None, None, None]).float()

    found = log_likelihood(model, x, 1, sigmas=sigmas, **prior)
    want = torch.distributions.Normal(mean, total[-1].sqrt()).log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(found, want, rtol=0, atol=2e-3)


def test_order_on_the_mixture():
    coarse, fine = (error(levels).abs().mean().item() for levels in (81, 321))
    print(coarse, fine)
    assert error(161).abs().max() < 0.06  # of densities that differ by 39 nats
    assert 1.8 < np.log2(coarse / fine) / 2 < 2.4


def test_probes_are_unbiased_and_reproducible():
    all_probes = error(11)
    few = torch.stack([error(11, 1, seed) for seed in range(49)])
    noise = few.std(0) / 7
    assert (noise > 1e-3).any()
    assert ((few.mean(0) - all_probes).abs() <= 4.9 * noise + 1e-4).all()
    x, sigmas = points(), geometric(50, 0.1, 5)

    def run(x, **options):
        return log_likelihood(mixture.model(sigmas), x, sigmas=sigmas, **options)

    assert torch.equal(run(x)[40:], run(x[40:], first_id=40)) and not torch.equal(run(x), run(x, seed=1))
    signs = _signs(x, 3, 0, 0)
    assert set(signs.unique().tolist()) == {-1, 1} and not torch.equal(signs[0], signs[1])


@pytest.mark.filterwarnings("ignore:sigmas. 5 levels are too few")
def test_a_network():
    """Parameters that require gradients get none, and the result requires none."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NCSN(geometric(1, 0.1, 4), channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()
    x = torch.rand(3, 1, 8, 8)
    found = log_likelihood(at_sigmas(net, karras(1, 0.1, 5)), x, prior_std=1.1)
    assert found.shape == (3,) and found.isfinite().all() and not found.requires_grad
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"sigmas": None}, "sigmas: the model has none"),
        ({"sigmas": [1.0]}, "at least 2 levels"),
        ({"x": torch.zeros(2)}, r"x must be a tensor of floats \[n, D\] or \[n, C, H, W\]"),
        ({"x": torch.zeros(2, 2, dtype=torch.int64)}, r"x must be a tensor of floats"),
        ({"x": points(2).numpy()}, r"x must be a tensor of floats .*, got ndarray"),
        ({"model": torch.no_grad()(lambda x, level: -x)}, "model must be differentiable in x"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
        ({"probes": 0}, "probes must be"),
        ({"prior_std": 0.0}, "prior_std must be positive"),
    ],
)
def test_what_is_refused(change, says):
    arguments = {"model": lambda x, level: -x, "x": points(2), "sigmas": [1.0, 0.1]} | change
    with pytest.raises(ValueError, match=says):
        log_likelihood(**arguments)


def test_a_score_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="not finite at level 1"):
        log_likelihood(lambda x, level: x / 0, points(2), sigmas=[1.0, 0.1])


def small(x=None):
    sigmas = karras(5, 0.05, 4)
    total = torch.tensor(sigmas**2 + 0.25).float()
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)) if x is None else x
    return (lambda x, level: -x / total[level][:, None, None, None]), x, sigmas


@pytest.mark.parametrize("probes", [1, None])
def test_whatever_the_caller_has_switched_on(probes):
    model, x, sigmas = small()
    want = log_likelihood(model, x, probes, sigmas=sigmas)
    with torch.inference_mode():
        assert log_likelihood(model, x.clone(), probes, sigmas=sigmas).equal(want)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert log_likelihood(model, x, probes, sigmas=sigmas).equal(want)
    torch.set_default_dtype(torch.float64)
    try:
        assert log_likelihood(model, x, probes, sigmas=sigmas).equal(want)
    finally:
        torch.set_default_dtype(torch.float32)
    writes = log_likelihood(lambda x, level: model(x.clone(), level) + 0 * x.mul_(3), x, probes, sigmas=sigmas)
    assert writes.equal(want)


def test_no_images():
    model, x, sigmas = small()
    for probes in (1, None):
        found = log_likelihood(model, x[:0], probes, sigmas=sigmas)
        assert found.shape == (0,) and found.dtype == torch.float64


def test_what_is_no_score_is_named():
    model, x, sigmas = small()
    with pytest.raises(ValueError, match=r"tensor of x's shape .*, got tuple"):
        log_likelihood(lambda x, level: (model(x, level), None), x, sigmas=sigmas)
    with pytest.raises(ValueError, match="function of x and level, but two calls with one image differ"):
        log_likelihood(lambda x, level: model(x, level) + torch.randn_like(x), x, sigmas=sigmas)
    with pytest.raises(ValueError, match="function of x and level, but two calls with one image differ"):
        log_likelihood(lambda x, level: model(x, level) + x.mean(), x, sigmas=sigmas)
    dropping = torch.nn.Dropout(0.5)
    with pytest.raises(ValueError, match="the model is in training mode"):
        log_likelihood(dropping, x, sigmas=sigmas)
