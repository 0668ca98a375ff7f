"""Terms beside the score: linear measurements against the exact Gaussian posterior, guidance, operators."""

import numpy as np
import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.models.guidance import classifier_free, classifier_guided, posterior, preconditioned, with_drift
from sgm_engine.models.inverse import LinearOperator, blur, downsample, mask
from sgm_engine.plans.plan import annealed_langevin, consistent_annealed
from sgm_engine.plans.schedule import geometric

SIGMAS = geometric(1, 0.1, 5)
SHAPE = (1, 4, 4)


def covariance(size=16, rho=0.8):
    i = torch.arange(size, dtype=torch.float64)
    return rho ** (i[:, None] - i[None]).abs()


def prior(sigmas, cov):
    """The score of N(0, cov) data at each level, of samples with cov's number of elements."""
    eye = torch.eye(len(cov), dtype=torch.float64)
    precision = torch.linalg.inv(cov + torch.tensor(np.array(sigmas))[:, None, None] ** 2 * eye).float()
    return lambda x, level: -(x.flatten(1) @ precision[level[0]]).reshape(x.shape)  # slots in step: one level


OPERATORS = {
    "mask": lambda shape: mask(torch.arange(16).reshape(1, 4, 4) % 3 == 0, shape),
    "blur": lambda shape: blur(torch.tensor([[0, 0.1, 0], [0.2, 0.4, 0.1], [0, 0.2, 0]]), shape),
    "downsample": lambda shape: downsample(2, shape),
    "any": lambda shape: LinearOperator(lambda x: x.flatten(1).cumsum(1)[:, ::5] / 4, shape),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gaussian_posterior(name):
    """The chain has the law that its linear recursion says, and that is the exact posterior to a few percent."""
    operator, noise_y, sigmas, cov = OPERATORS[name](SHAPE), 0.3, geometric(1, 0.03, 5), covariance()
    a = operator.forward(torch.eye(16).reshape(16, *SHAPE)).flatten(1).T.double()  # [M, 16]
    y = a @ torch.linalg.cholesky(cov) @ torch.linspace(-1, 1, 16, dtype=torch.float64)
    plan = annealed_langevin(sigmas, 300, 5e-4, start="normal", denoise=False)

    eye = torch.eye(16, dtype=torch.float64)
    mean, law = torch.zeros(16, dtype=torch.float64), eye.clone()
    for sigma, b, c in zip(plan.sigma, plan.b, plan.c, strict=True):
        tau = noise_y**2 + sigma**2
        step = eye - b * (torch.linalg.inv(cov + sigma**2 * eye) + a.T @ a / tau)
        mean, law = step @ mean + b * a.T @ y / tau, step @ law @ step.T + c**2 * eye
    exact = torch.linalg.inv(torch.linalg.inv(cov) + a.T @ a / noise_y**2)
    assert (mean - exact @ a.T @ y / noise_y**2).abs().max() < 0.02
    assert (law - exact).abs().max() < 0.01

    measured = y.float().reshape(1, *operator.forward(torch.zeros(1, *SHAPE)).shape[1:])
    model, n = posterior(prior(sigmas, cov), operator, measured, noise_y, sigmas), 1000
    x = Engine(model, n, sigmas=sigmas, shape=SHAPE).sample(n, plan=plan).double().flatten(1)
    deviation = law.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() <= 4.9 * deviation / n**0.5).all()
    assert ((x.std(0) / deviation - 1).abs() <= 4.9 / (2 * n) ** 0.5).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    operator = OPERATORS[name](SHAPE)
    columns = operator.forward(torch.eye(16).reshape(16, *SHAPE)).flatten(1).T
    assert operator.norm == pytest.approx(torch.linalg.matrix_norm(columns, 2).item(), rel=1e-2)
    y = torch.randn(operator.forward(torch.zeros(3, *SHAPE)).shape)
    torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ columns)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: LinearOperator(lambda x: x**2, SHAPE), "not linear"),
        (lambda: LinearOperator(lambda x: x + 1, SHAPE), "not linear"),
        (lambda: LinearOperator(lambda x: x * torch.arange(4), SHAPE, lambda y: y), "adjoint is not forward's"),
        (lambda: downsample(3, SHAPE), r"factor must divide the image of 4×4 pixels, got 3"),
        (lambda: blur(torch.ones(2, 2), SHAPE), r"kernel must be .* got \[2, 2\]"),
        (lambda: mask(torch.ones(4, 4), SHAPE), r"known must be bool"),
        (
            lambda: posterior(lambda x, level: x, OPERATORS["mask"](SHAPE), torch.zeros(SHAPE), -1, SIGMAS),
            "noise must be",
        ),
        (lambda: posterior(lambda x, level: x, OPERATORS["mask"](SHAPE), torch.tensor(torch.nan), 1, SIGMAS), "finite"),
        (
            lambda: posterior(lambda x, level: x, OPERATORS["mask"](SHAPE), torch.zeros(5, *SHAPE), 1, SIGMAS),
            r"one measurement, \[1, 4, 4\] or \[1, 1, 4, 4\], got \[5, 1, 4, 4\]: all samples of a request share it",
        ),
        (lambda: with_drift(lambda x, level: x, None, SIGMAS), "a term must be callable"),
        (lambda: with_drift(lambda x, level: x, lambda x, s: x), "sigmas: the model has none"),
        (lambda: preconditioned(lambda x, level: x, downsample(2, SHAPE), sigmas=SIGMAS), "root must map images"),
    ],
)
def test_bad_terms(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_a_plan_too_coarse_for_the_measurement_is_refused():
    """Without the term the plan is stable; with it the curvature is 1/σ² + ‖A‖²/(noise² + σ²)."""
    plan = annealed_langevin(SIGMAS, 2, 0.012)
    model = posterior(prior(SIGMAS, covariance()), OPERATORS["mask"](SHAPE), torch.zeros(1, *SHAPE), 0, SIGMAS)
    Engine(model.model, 2, sigmas=SIGMAS, shape=SHAPE).sample(1, plan=plan)
    with pytest.raises(ValueError, match=r"must diverge .*the curvature of the terms\) is 2.4"):
        Engine(model, 2, sigmas=SIGMAS, shape=SHAPE).sample(1, plan=plan)


# -- guidance ----------------------------------------------------------------------------------------------------------


def scored(model, level=2):
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, torch.full((3,), level)), x


def test_drift_and_classifier_are_terms():
    base = prior(SIGMAS, covariance())
    plain, x = scored(base)
    drifted, _ = scored(with_drift(base, lambda x, sigma: x / sigma**2, SIGMAS))
    torch.testing.assert_close(drifted, plain + x / SIGMAS[2] ** 2, rtol=1e-5, atol=1e-5)
    guided = classifier_guided(base, lambda x, sigma: -(x**2).sum((1, 2, 3)) / sigma.flatten(), 0.5, SIGMAS)
    torch.testing.assert_close(scored(guided)[0], plain - x / SIGMAS[2], rtol=1e-5, atol=1e-5)
    assert Engine(guided, 2, shape=SHAPE).sample(2, plan=consistent_annealed(SIGMAS)).isfinite().all()
    wrong = classifier_guided(base, lambda x, sigma: x, sigmas=SIGMAS)
    with pytest.raises(ValueError, match="log_prob must return one value a sample"):
        scored(wrong)


def test_preconditioned_langevin():
    """After 20 steps each direction of a stiff Gaussian has the variance of v ← (1 − α/σ²)²·v + 2α, where plain
    Langevin at the longest stable step has hardly left the start in the widest."""
    sigma, shape, n, alpha, steps = 0.1, (1, 4, 4), 20_000, 0.003, 20
    total = covariance(rho=0.98) + sigma**2 * torch.eye(16, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(total)
    root = torch.linalg.cholesky(total / sigma**2).float()

    def times(matrix):
        return lambda x: (x.flatten(1) @ matrix.T).reshape(x.shape)

    model = prior([sigma], covariance(rho=0.98))
    coordinates = preconditioned(model, LinearOperator(times(root), shape, times(root.T)), [sigma])

    def spread(model, step):
        plan = annealed_langevin([sigma], steps, step, denoise=False, start="normal", start_scale=sigma / 2)
        drawn = Engine(model, batch=1000, sigmas=[sigma], shape=shape).sample(n, seed=3, plan=plan)
        x = (model.image(drawn) if model is coordinates else drawn).flatten(1).double() @ vectors
        return x.var(0) / values

    v = (sigma / 2) ** 2
    for _ in range(steps):
        v = (1 - alpha / sigma**2) ** 2 * v + 2 * alpha
    assert (spread(coordinates, alpha) / (v / sigma**2) - 1).abs().max() < 4.9 * (2 / n) ** 0.5
    assert spread(model, 0.019)[-1] < 0.1


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_classifier_free(weight):
    conditional, unconditional = prior(SIGMAS, covariance()), prior(SIGMAS, torch.eye(16, dtype=torch.float64))
    found, _ = scored(classifier_free(conditional, unconditional, weight, SIGMAS))
    c, u = scored(conditional)[0], scored(unconditional)[0]
    torch.testing.assert_close(found, (1 - weight) * u + weight * c, rtol=1e-5, atol=1e-5)
