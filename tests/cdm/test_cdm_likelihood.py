"""Likelihood in one pass: of images in bits, and beside the probability flow's and the truth."""

import math

import numpy as np
import torch

from sgm_engine.cdm.ablation import Exact
from sgm_engine.cdm.likelihood import auroc, pixel_gaussian_bits
from sgm_engine.evaluation.likelihood import image_bits, log_likelihood
from sgm_engine.keys import Key
from sgm_engine.models.cdm import classes as schedules
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.networks import UNet
from sgm_engine.plans.schedule import karras
from sgm_engine.training.toy import TRIPLE


def test_bits_of_images_are_those_of_the_density():
    """An untrained U-Net with a baseline is a Gaussian, whose bits are known."""
    classes = schedules.vp_geometric(4, 10.0, 0.1)
    net = UNet(1, 8, classes, width=8, multipliers=(1,), blocks=1, baseline=(0.2, 0.7)).eval()
    model = CDM(net, classes, (1, 8, 8), scale=2.0, shift=-1.0)
    images = np.random.default_rng(0).integers(0, 256, (300, 1, 8, 8), dtype=np.uint8)
    found = image_bits(model.log_prob, images, dequantised=False, batch=7)
    of_x = torch.distributions.Normal(torch.tensor(0.6, dtype=torch.float64), 0.35)
    x = (torch.from_numpy(images).double() + 0.5) / 256
    exact = -of_x.log_prob(x).flatten(1).mean(1) / math.log(2) + 8
    assert torch.allclose(found, exact, atol=1e-4)
    noisy = image_bits(model.log_prob, images)
    assert 0 < (noisy - found).abs().max() < 0.02 and torch.equal(noisy, image_bits(model.log_prob, images, batch=100))
    # independent uniform pixels: 8 bits exactly, and their Gaussian ½·log₂(2πe/12)
    bits, _ = pixel_gaussian_bits(images, images)
    assert abs(bits - (8 + 0.5 * math.log2(2 * math.pi * math.e / 12))) < 0.02


def test_auroc():
    a, b = torch.tensor([3.0, 2.0, 2.0, 0.0]), torch.tensor([2.0, 1.0])
    pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    assert auroc(a, b) == pairs.mean() and auroc(b, a) == 1 - pairs.mean()
    assert auroc(a + 10, b) == 1


def test_one_pass_the_flow_and_the_truth_agree():
    """Mean −log p of 100 points of the mixture: SPEC.md §5; the flow by Heun's steps with the exact divergence."""
    classes = schedules.variance_preserving(karras(40, 0.01, 200, 5))
    model = CDM(Exact(classes), classes, (2, 1, 1))
    x = TRIPLE.sample(Key(77, torch.arange(100))).view(-1, 2, 1, 1)
    truth = TRIPLE.log_prob(x)
    with torch.no_grad():
        one_pass = model.log_prob(x)
    by_flow = log_likelihood(model, x, probes=None, prior_std=math.hypot(40, 1))
    print(f"truth {-truth.mean():.4f}, one pass {-one_pass.mean():.4f}, flow {-by_flow.mean():.4f}")
    assert (one_pass - truth).abs().max() < 1e-12
    assert abs(by_flow.mean() - truth.mean()) < 0.002
