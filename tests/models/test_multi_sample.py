"""Networks of several noisy copies: exact scores of exact networks, the joint chain, files, training, drawing."""

import json

import numpy as np
import pytest
import torch

from sgm_engine import Engine, annealed_langevin, load_checkpoint
from sgm_engine.checkpoints.checkpoint import save_checkpoint
from sgm_engine.keys import Key
from sgm_engine.models.config import ModelConfig
from sgm_engine.models.multi_sample import JointScore, MeanScore, MultiSample, MultiSampleConfig
from sgm_engine.models.ncsn import NCSN
from sgm_engine.training import multisample
from sgm_engine.training.objectives import multi_sample
from sgm_engine.training.toy import TRIPLE

SIGMAS, M = [1.0, 0.4], 3


class ExactScores(torch.nn.Module):
    """Of M copies [N, 2M, 1, 1] of a point of the mixture: each copy's part answers with the score at their mean."""

    shape = (2 * M, 1, 1)

    def __init__(self, sigmas=SIGMAS, dtype=torch.float64):
        super().__init__()
        self.register_buffer("sigmas", torch.tensor(sigmas, dtype=dtype))

    def forward(self, ys, level):
        mean = ys.view(len(ys), M, 2, 1, 1).mean(1)
        return TRIPLE.score(mean, self.sigmas[level]).repeat(1, M, 1, 1)

    def at_sigmas(self, sigmas):
        return ExactScores(sigmas)


def points(n):
    x = TRIPLE.sample(Key(0, torch.arange(n))).view(n, 2, 1, 1)
    level = torch.arange(n) % 2
    model = MultiSample(ExactScores(), M)
    sigma = model.sigmas[level].view(n, 1, 1, 1)
    ys = torch.cat([x + sigma * Key(1, torch.arange(n)).normal(x, m) for m in range(M)], 1)
    return model, ys, level


def joint_log_prob(ys, sigma):
    """log p(y_1 … y_M) of the copies themselves, by their joint covariance: [n] of ys [n, M, 2], float64."""
    covariance = lambda s: s**2 * torch.ones(M, M).double() + sigma**2 * torch.eye(M).double()  # noqa: E731
    terms = []
    for w, mu, s in zip(TRIPLE.weights, TRIPLE.means, TRIPLE.stds, strict=True):
        normal = torch.distributions.MultivariateNormal(torch.zeros(M).double(), covariance(s))
        terms.append(w.log() + normal.log_prob((ys - mu).transpose(1, 2)).sum(1))
    return torch.stack(terms, 1).logsumexp(1)


def test_the_prediction_is_the_posterior_mean():
    """Of the mean of the copies, by multisample.tweedie and a one-sample score."""
    model, ys, level = points(40)
    mean, sigma = multisample.tweedie(ys.view(40, M, 2, 1, 1).transpose(0, 1), model.sigmas[level])
    torch.testing.assert_close(model(ys, level), TRIPLE.denoised(mean, sigma), rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, model.network.sigmas[level], rtol=1e-12, atol=0)


def test_the_joint_score_is_that_of_all_copies():
    """(x̂ − y_m)/σ² against the gradient of the joint density of y_1 … y_M."""
    model, ys, level = points(40)
    for i in range(2):
        at = level == i
        own = ys[at].view(-1, M, 2).requires_grad_()
        (exact,) = torch.autograd.grad(joint_log_prob(own, model.sigmas[i]).sum(), own)
        found = JointScore(model)(ys[at], level[at])
        torch.testing.assert_close(found.view(-1, M, 2), exact, rtol=0, atol=1e-10)


def test_the_score_of_the_mean():
    model, ys, level = points(40)
    score = MeanScore(model)
    x = ys.view(40, M, 2, 1, 1).mean(1)
    torch.testing.assert_close(score(x, level), TRIPLE.score(x, score.sigmas[level]), rtol=0, atol=1e-5)
    assert score.shape == (2, 1, 1) and score.deviation.view(M, 2).sum(0).abs().max() < 1e-5
    elsewhere = score.at_sigmas([0.7, 0.5])
    torch.testing.assert_close(elsewhere(x, level), TRIPLE.score(x, elsewhere.sigmas[level]), rtol=0, atol=1e-5)


def test_both_chains_find_the_data():
    """Annealed Langevin on the mean, and on all copies at once: the shares of the modes within four standard errors."""
    n, sigmas = 1000, np.geomspace(3, 0.1, 8)
    model = MultiSample(ExactScores(sigmas, torch.float32), M)
    for score, width in ((MeanScore(model), 1), (JointScore(model), M**0.5)):
        plan = annealed_langevin(score.sigmas, 30, 0.002 * width**2, start="normal", start_scale=3.0 * width)
        x = Engine(score, n).sample(n, plan=plan)
        if width > 1:
            assert x.shape == (n, 2 * M, 1, 1) and (x.view(n, M, 2) - x.view(n, M, 2)[:, :1]).abs().max() < 1e-4
            x = score.x_of(x)
        nearest = (x.view(n, 1, 2) - TRIPLE.means).norm(dim=2).argmin(1)
        shares = nearest.bincount(minlength=3) / n
        data = TRIPLE.sample(Key(5, torch.arange(100_000)))
        truth = (data[:, None] - TRIPLE.means).norm(dim=2).argmin(1).bincount(minlength=3) / 100_000
        assert ((shares - truth).abs() < 4 * (truth * (1 - truth) / n).sqrt()).all(), (width, shares, truth)


def tiny(channels=1):
    config = MultiSampleConfig(2, ModelConfig("NCSN", 2 * channels, 8, 4, (1.0, 0.1), True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return config.build().eval()


def test_files(tmp_path):
    """Both views' weights are one file, which loads as an ordinary score model."""
    model = tiny()
    x, level = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0])
    for i, saved in enumerate((model, model.model)):
        save_checkpoint(saved, tmp_path / f"{i}.safetensors")
        loaded = load_checkpoint(tmp_path / f"{i}.safetensors")
        assert isinstance(loaded, MeanScore) and loaded.config == model.config and not loaded.training
        assert torch.equal(loaded(x, level), model(x, level))
        drawn = [Engine(m, 4).sample(4, plan=annealed_langevin(m.sigmas, 2, 1e-3)) for m in (model, loaded)]
        assert drawn[0].shape == (4, 1, 8, 8) and torch.equal(*drawn)
    assert isinstance(model.model.network, NCSN) and model.model.network.channels == 2
    with pytest.raises(ValueError, match="copies must be an integer from 2 to 64, got 1"):
        MultiSampleConfig(1, model.config.network)
    with pytest.raises(ValueError, match="network must have channels for 3 copies, got 2"):
        MultiSampleConfig(3, model.config.network)


def test_the_objective_takes_its_copies_from_the_model():
    model, x = tiny().model, torch.rand(4, 1, 8, 8)
    arguments = model, x, torch.tensor([0, 1, 1, 0]), Key(0, torch.arange(4))
    assert torch.equal(multi_sample(*arguments), multi_sample(*arguments, copies=2))
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        multi_sample(model.network, *arguments[1:])


def test_train_and_sample(sgm, tmp_path):
    """From the command line: resumed, drawn from, started from, and refused where something does not fit."""
    pytest.importorskip("lightning", reason="pip install 'sgm-engine[train]'")
    np.save(tmp_path / "train.npy", np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8))
    common = ("train", "--objective", "multi_sample", "--copies", 3, "--data", ".", "--accelerator", "cpu")
    small = ("image_size=8", "ngf=4", "levels=2", "batch=4", "save_every=2", "sample_every=2")
    for steps in (2, 4):
        done = sgm(*common, "--out", "run", "--set", *small, f"steps={steps}")
        assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stdout and (tmp_path / "run" / "samples" / "00000004.png").exists()
    model = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert model.model.copies == 3 and model.law is not None and model.plan["name"] == "sde_dpm_solver_2m"
    assert json.loads(model.config.to_json())["network"]["channels"] == 3
    done = sgm("sample", "--checkpoint", "run/model.safetensors", "--n", 2, "--batch", 2, "--nfe", 4, "--out", "x.npz")
    assert done.returncode == 0 and np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 8, 8, 1), done.stderr
    more = sgm(*common, "--out", "more", "--init", "run/model.safetensors", "--set", *small, "steps=1")
    assert more.returncode == 0, more.stderr
    wrong = sgm(
        *common[:3], "--copies", 2, *common[5:], "--out", "w", "--init", "run/model.safetensors", "--set", *small
    )
    assert wrong.returncode == 2 and "holds no network of 2 copies" in wrong.stderr
    one = sgm("train", "--config", "mnist_tiny", "--copies", 2, "--data", ".", "--out", "w")
    assert one.returncode == 2 and "copies must be between 2 and 64 if, and only if" in one.stderr
