"""Several noisy copies of one x: the table of the exact mixture, and the objective and samplers' feeding of copies."""

import numpy as np
import pytest
import torch

from sgm_engine.keys import Key
from sgm_engine.training import multisample, objectives
from sgm_engine.training.compare import AsScore, MultiSampleMLP, facts, image_targets, stable, target_error, train
from sgm_engine.training.toy import TRIPLE, ScoreMLP, gap

KEY = Key(0, torch.arange(100_000))


def test_table_of_the_mixture():
    """MSE a dimension of E[x | M copies] at σ = 0.8, and how wrong (x̂ − ȳ)/σ² is as the score at σ."""
    rows = [line.split("|")[1:-1] for line in facts(100_000)[2:6]]
    found = {int(m): (float(mse), float(wrong)) for m, mse, wrong in rows}
    for m, mse in {1: 0.2586, 2: 0.1387, 4: 0.0730, 16: 0.0260}.items():
        assert found[m][0] == pytest.approx(mse, rel=0.015)
    assert {m: wrong for m, (_, wrong) in found.items() if m in (1, 2, 4)} == pytest.approx(
        {1: 0.0, 2: 0.20, 4: 0.35}, abs=0.01
    )


@pytest.mark.parametrize("size, mse", [(1, 0.2586), (4, 0.090), (16, 0.023), (64, 0.0058)])
def test_variance_of_the_stable_target(size, mse):
    assert target_error(size, 0.8, n=50_000) == pytest.approx(mse, rel=0.03)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_tweedie_is_the_posterior_mean(copies):
    """E[x | y_1 … y_M] from the joint density, by Bayes over each component, against one sample at σ/√M."""
    sigma, x = 0.8, TRIPLE.sample(Key(0, torch.arange(50)))
    ys = torch.stack([x + sigma * Key(0, torch.arange(50)).normal(x, 2 + m) for m in range(copies)])
    mean, s = multisample.tweedie(ys, sigma)
    weights, means = [], []
    for w, mu, std in zip(TRIPLE.weights, TRIPLE.means, TRIPLE.stds, strict=True):
        precision = 1 / std**2 + copies / sigma**2
        covariance = std**2 * torch.ones(copies, copies).double() + sigma**2 * torch.eye(copies).double()
        joint = torch.distributions.MultivariateNormal(torch.zeros(copies).double(), covariance)
        weights.append(w.log() + joint.log_prob((ys - mu).permute(1, 2, 0)).sum(1))
        means.append((mu / std**2 + ys.sum(0) / sigma**2) / precision)
    posterior = (torch.stack(weights, 1).softmax(1)[:, :, None] * torch.stack(means, 1)).sum(1)
    torch.testing.assert_close(TRIPLE.denoised(mean, s), posterior, rtol=0, atol=1e-10)
    exact = TRIPLE.score(mean, s)
    torch.testing.assert_close(multisample.score(posterior, mean, sigma, copies), exact, rtol=0, atol=1e-9)


def test_copies_have_the_mean_they_were_asked_for_and_the_right_law():
    mean = TRIPLE.sample(KEY)
    ys = multisample.copies_of(mean, 0.8, 4, KEY).unflatten(1, (4, 2))
    torch.testing.assert_close(ys.mean(1), mean, rtol=0, atol=1e-12)
    deviation = (ys - mean[:, None]).flatten(1)
    covariance = deviation.T @ deviation / len(mean) / 0.8**2
    expected = torch.kron(torch.eye(4) - 0.25, torch.eye(2)).double()
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.02)


def test_objective_is_the_denoising_loss_of_the_mean():
    """With x̂ from the mean alone, multi_sample is denoising at σ/√M on the mean's own noise, pathwise."""
    model, m = ScoreMLP([1.0, 0.3]).double(), 4
    x, levels, key = TRIPLE.sample(Key(3, torch.arange(64))), torch.arange(64) % 2, Key(4, torch.arange(64))

    class OfMean:
        sigmas = model.sigmas * m**0.5

        def __call__(self, ys, level):
            mean = ys.unflatten(1, (m, -1)).mean(1)
            return mean + model.sigmas[level][:, None] ** 2 * model(mean, level)

    class MeanNoise:
        def normal(self, like, draw=0):
            return sum(key.normal(like, i) for i in range(m)) / m**0.5

    torch.testing.assert_close(
        objectives.multi_sample(OfMean(), x, levels, key, copies=m),
        objectives.denoising(model, x, levels, MeanNoise()),
        rtol=1e-6,
        atol=0,
    )


def test_networks_of_the_comparison_learn():
    key = Key(11, torch.arange(8192))
    sigmas = [2.0, 1.0, 0.5, 0.2]
    many = train(lambda *a: objectives.multi_sample(*a, copies=2), MultiSampleMLP(sigmas, 2), 0, steps=300, batch=128)
    assert gap(AsScore(many), TRIPLE, key) < 0.12
    assert gap(train(stable, ScoreMLP(sigmas), 0, steps=300, batch=128), TRIPLE, key) < 0.11


def test_targets_of_images():
    """Far from other images all targets are the image; where noise drowns them, x is off by the data's own spread."""
    images = (255 * (np.random.default_rng(0).random((400, 1, 4, 4)) < 0.5)).astype(np.uint8)
    rows = [[float(v) for v in line.split("|")[1:-1]] for line in image_targets(images, [20.0, 0.02], 100, (8, 40))[2:]]
    (_, x, few, many), near = rows
    spread = images.astype(float).var() / 256**2
    assert x * 20**2 == pytest.approx(spread, rel=0.05)
    assert few == pytest.approx(x / 8, rel=0.1) and many == pytest.approx(x / 40, rel=0.25)  # means of so many images
    assert max(near[1:]) < 1e-6


def test_bad_arguments():
    with pytest.raises(ValueError, match="ys must be M ≥ 1 observations"):
        multisample.tweedie(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="copies must be at least 1"):
        objectives.multi_sample(ScoreMLP([1.0]), torch.zeros(2, 2), torch.zeros(2).long(), KEY, copies=0)
