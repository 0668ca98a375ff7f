"""What the tests of float8 share."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.plans.schedule import geometric
from sgm_engine.tuning.float8_calibration import calibrate_float8

SIGMAS = geometric(1, 0.1, 3)


PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)


class Small(nn.Module):
    """Five convolutions, two of which qualify; the scores of a network are those of the last."""

    sigmas, shape = SIGMAS, (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.inside = nn.ModuleList([nn.Conv2d(32, 64, 3, padding=2, dilation=2), nn.Conv2d(64, 32, 3, padding=1)])
        self.point = nn.Conv2d(32, 32, 1)
        self.last = nn.Conv2d(32, 1, 3, padding=1)
        self.register_buffer("sigma", torch.tensor(SIGMAS, dtype=torch.float32))

    def forward(self, x, level):
        y = F.elu(self.first(x))
        for conv in self.inside:
            y = F.elu(conv(y))
        return self.last(self.point(y)) / self.sigma[level][:, None, None, None]


class Normed(nn.Module):
    """Of the shape of a score network, with a norm; one convolution of three qualifies. Its forward is a test's."""

    sigmas, shape = SIGMAS, (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32)
        self.inside, self.last = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 1, 3, padding=1)


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval().requires_grad_(False)


@pytest.fixture
def scales(net):
    return calibrate_float8(net, 4, plan=PLAN, emulate=True)
