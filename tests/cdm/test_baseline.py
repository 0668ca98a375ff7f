"""A classifier beside a denoiser: their figures against closed forms."""

import math

import numpy as np
import pytest
import torch

from sgm_engine.cdm import baseline
from sgm_engine.keys import Key
from sgm_engine.models.cdm.model import DDM
from tests.cdm.potentials import digits, potential

LADDER = torch.tensor(np.geomspace(20.0, 0.02, 2000))


class Gaussian(torch.nn.Module):
    """The score of data N(.3, .4²·I), at 2,000 levels."""

    sigmas = LADDER

    def forward(self, x, level):
        return -(x - 0.3) / (0.16 + self.sigmas[level].to(x.dtype).view(-1, 1) ** 2)


def test_what_a_gaussian_misses_and_its_bound():
    """E‖ε̂ − ε‖²/d is v·/(v + σ²)'s closed form, and the bound of many levels meets −log p(x)."""
    n, d, model = 300, 30, Gaussian()
    x = 0.3 + 0.4 * Key(3, torch.arange(n)).normal(torch.empty(n, d, dtype=torch.float64), 9999)
    errors = baseline.squared_errors(model, x)
    want = 0.16 / (0.16 + LADDER**2)  # the variance of ε given x + σ·ε
    assert ((errors.mean(1) / d) / want - 1).abs().max() < 0.08
    last = float(0.16 * LADDER[-1] ** 2 / (0.16 + LADDER[-1] ** 2))
    nats = baseline.bound(model, x, errors, 0.3, 0.4, last) / d
    exact = 0.5 * math.log(2 * math.pi * 0.16) + float(((x - 0.3) ** 2).mean()) / (2 * 0.16)
    assert 0 < float(nats.mean()) - exact < 0.03
    assert (baseline.bound(model, x, 1.1 * errors, 0.3, 0.4, last) / d).mean() > exact + 0.1


def test_both_are_compared():
    cdm = potential()
    ddm = DDM(cdm.classifier, cdm.classes, cdm.shape, cdm.scale, cdm.shift)
    with torch.no_grad():
        cdm.classifier.head.weight.zero_()  # then both are the Gaussian base
    found = baseline.compare({"CDM": cdm, "DDM": ddm}, digits(12), digits(8, seed=1))
    assert torch.allclose(found["CDM"]["missed"], found["DDM"]["missed"], rtol=1e-4)
    assert torch.allclose(found["CDM"]["bound"], found["DDM"]["bound"], rtol=1e-4)
    assert found["CDM"]["one pass"].isfinite().all() and "one pass" not in found["DDM"]


def test_the_wrong_kind_is_refused(capsys):
    with pytest.raises(SystemExit):
        baseline.main(["--cdm", "mnist", "--ddm", "cdm_mnist", "--data", "."])
    assert "holds a NCSN, not a CDM" in capsys.readouterr().err


def test_the_bound_is_the_sum_of_the_chain_s_divergences():
    """Each step's Kullback–Leibler divergence of Gaussians, written out, with any errors; one image of 4 pixels."""
    sigmas = [3.0, 1.2, 0.4, 0.1]
    model = Gaussian()
    model.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x, e = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((1, 4), (4, 4)))
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    want = kl(normal(x, 3.0), normal(0.3, math.hypot(3.0, 0.4))).sum()
    for i in range(3):
        share, at = (sigmas[i + 1] / sigmas[i]) ** 2, torch.randn(4, generator=g, dtype=torch.float64)
        std = sigmas[i + 1] * (1 - share) ** 0.5
        step = [normal(clean + share * (at - clean), std) for clean in (x[0], x[0] + sigmas[i] * e[i])]
        want = want + kl(*step).sum()
    want = want - normal(x[0] + sigmas[3] * e[3], 0.05).log_prob(x[0]).sum()
    found = baseline.bound(model, x, e.square().sum(1, keepdim=True), 0.3, 0.4, 0.05**2)
    assert torch.allclose(found, want.reshape(1), rtol=1e-6)
