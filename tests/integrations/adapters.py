"""What the tests of integrations share."""

import pytest
import torch
from torch import nn

from sgm_engine.models import NCSN

SHAPE = (1, 4, 4)


class Blend(nn.Module):
    """The denoiser of data N(µ, 1) with a learnable µ: elementwise, so its bits do not depend on the batch."""

    sigma_min, sigma_max = 0.0, float("inf")

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, sigma, labels=None, scale=1.0):
        variance = sigma.reshape(-1, *(1,) * (x.dim() - 1)) ** 2
        shift = 0 if labels is None else labels.reshape(variance.shape)
        return scale * (x + variance * (self.mean + shift)) / (1 + variance)


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN([1.0, 0.5, 0.25, 0.125], channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()
