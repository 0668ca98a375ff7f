"""The steps of the probability flow's likelihood: few of them do not flatter, and a tolerance is kept."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from sgm_engine.cdm.metropolis import Density
from sgm_engine.data.sets import open_images
from sgm_engine.evaluation.likelihood import FlowDensity, bits_per_dim, likelihood_within, log_likelihood
from sgm_engine.models.score_model import as_score
from sgm_engine.plans.law import DataLaw
from sgm_engine.plans.schedule import karras
from sgm_engine.training.toy import TRIPLE, Mixture


class Exact:
    """The exact score of a mixture at any sigmas, in the dtype that it is asked in."""

    def __init__(self, truth, sigmas):
        self.truth, self.sigmas = truth, torch.tensor(np.array(sigmas), dtype=torch.float64)

    def at_sigmas(self, sigmas):
        return Exact(self.truth, sigmas)

    def __call__(self, x, level):
        return self.truth.score(x, self.sigmas[level])


def pixels(std, n=64, dim=4):
    """Data N(½, std²·I), points that are as far from the mean as points of it are, and the exact prior."""
    truth = Mixture([1.0], [[0.5] * dim], [std])
    x = 0.5 + math.hypot(std, 0.01) * torch.randn(n, dim, generator=torch.Generator().manual_seed(0))
    return truth, x, {"prior_mean": 0.5}


@pytest.mark.parametrize("std", [0.001, 0.03, 0.3])
@pytest.mark.parametrize("levels, most", [(10, 0.12), (20, 0.03), (50, 0.006), (100, 0.0015)])
def test_few_levels_do_not_flatter(std, levels, most):
    """Karras's levels 5 → 0.01 of pixels with and without width, exact score and trace: bits per dimension too few."""
    truth, x, prior = pixels(std)
    sigmas = karras(5, 0.01, levels)
    found = log_likelihood(Exact(truth, sigmas), x, None, sigmas=sigmas, prior_std=math.hypot(5, std), **prior)
    gain = bits_per_dim(truth.log_prob(x, 0.01), 4, 1) - bits_per_dim(found, 4, 1)
    print(std, levels, gain.mean().item())
    assert abs(gain.mean()) < most


def test_too_few_own_levels_are_warned_of():
    truth, x, prior = pixels(0.03)
    with pytest.warns(UserWarning, match=r"10 levels are too few: .* bits per dimension; likelihood_within takes"):
        log_likelihood(Exact(truth, karras(5, 0.01, 10)), x, **prior)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_likelihood(Exact(truth, karras(5, 0.01, 50)), x, **prior)
        log_likelihood(Exact(truth, karras(5, 0.01, 10)), x, sigmas=karras(5, 0.01, 10), **prior)  # as it was told


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_a_tolerance_is_kept(tolerance):
    """Against the exact density of the mixture: the reported error bounds the true one, and is within the tolerance."""
    x = TRIPLE.sample(_key(128))
    mean = TRIPLE.weights @ TRIPLE.means
    model = Exact(TRIPLE, [100.0, 0.05])
    found = likelihood_within(model, x, tolerance, None, prior_mean=mean, dtype=torch.float64)
    wrong = (found.log_prob - TRIPLE.log_prob(x, 0.05)).abs()
    limit = tolerance * 2 * math.log(2)
    assert (found.error <= limit).all() and (found.noise == 0).all()
    prior = 2e-4  # that the end is no Gaussian, and 0.8 wider than σ
    assert (wrong <= found.error + prior).all() and wrong.max() < limit
    assert set(found.levels.tolist()) <= {9, 17, 33, 65, 129, 257, 513, 1025} and len(set(found.levels.tolist())) > 1


def _key(n):
    from sgm_engine.keys import Key

    return Key(3, torch.arange(n))


def test_a_point_does_not_depend_on_the_others():
    x, model = TRIPLE.sample(_key(16)), Exact(TRIPLE, [10.0, 0.05])
    many = likelihood_within(model, x, 0.01, 2, seed=4)
    few = likelihood_within(model, x[5:9], 0.01, 2, seed=4, first_id=5)
    for one, other in zip(many, few, strict=True):
        torch.testing.assert_close(one[5:9], other, rtol=0, atol=1e-9)
    assert (many.noise > 0).any()
    assert likelihood_within(model, x[:0]).log_prob.shape == (0,)


def test_float64_is_asked_for():
    """Points [n, D] in both precisions; the model sees what was asked for."""
    seen = []

    class Watched(Exact):
        def __call__(self, x, level):
            seen.append(x.dtype)
            return super().__call__(x, level)

    x, sigmas = TRIPLE.sample(_key(4)), karras(10, 0.05, 30)
    both = [log_likelihood(Watched(TRIPLE, sigmas), x, None, dtype=d) for d in (torch.float32, torch.float64)]
    assert set(seen[: len(seen) // 2]) == {torch.float32} and set(seen[len(seen) // 2 :]) == {torch.float64}
    assert 0 < (both[0] - both[1]).abs().max() < 1e-3


def test_what_cannot_be_had():
    x = TRIPLE.sample(_key(2))
    with pytest.raises(ValueError, match="tolerance must be positive and finite, got 0"):
        likelihood_within(Exact(TRIPLE, [10.0, 0.05]), x, 0)
    with pytest.raises(ValueError, match="told whole numbers"):
        likelihood_within(as_score(lambda x, level: -x, sigmas=[10.0, 0.05]), x)
    rough = Density(lambda x, s: torch.cos(300 * x.flatten(1)).sum(1), [1.0, 0.01], (1, 1, 2))
    with pytest.warns(UserWarning, match=r"2 of 2 points are not within 1e-09 bits per dimension after 1025 levels"):
        assert (likelihood_within(rough, x.view(2, 1, 1, 2), 1e-9, None).error > 0).all()


@pytest.mark.parametrize("data_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_pixels_of_another_range(data_range):
    """Bits of [0, 1] are the same in the model's units: the volume of the map between them counts."""
    low, high = data_range
    wide = high - low
    truth = Mixture([1.0], [[low + 0.4 * wide] * 4], [0.3 * wide])
    model = Density(lambda x, s: truth.log_prob(x, s), [5.0 * wide, 0.01 * wide], (1, 2, 2))
    model.data_range, model.law = data_range, DataLaw(low + 0.4 * wide, 0.3 * wide, low, high)
    x = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    density = FlowDensity(model, 0.001)
    found, want = density.log_prob(x), Mixture([1.0], [[0.4] * 4], [0.3]).log_prob(x, 0.01)
    assert bits_per_dim(found - want, 4, 1).abs().max() < 0.001
    assert len(density.errors) == len(density.levels) == 8 and max(density.errors) < 0.001


def test_eval_scores_by_the_flow(sgm, tiny_weights, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    common = ("eval", "x.npz", "--reference", "x.npz", "--metrics", "frechet,nll", "--checkpoint", tiny_weights)
    done = sgm(*common, "--nll", "--nll-images", 2, "--nll-tolerance", 1e6, "--json", "r.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    rows = [row for row in report["rows"] if "bits per dimension" in row["metric"]]
    assert [row["metric"] for row in rows] == ["bits per dimension, x.npz, 2 images"] * 2
    assert all(math.isfinite(row["value"]) for row in rows)
    assert "at most, moved an image's figure by" in report["notes"]["by the probability flow"]
    assert len(open_images(tmp_path / "x.npz")) == 12
