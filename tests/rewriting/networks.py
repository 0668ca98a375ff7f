"""What the tests of accelerate share."""

import pytest
import torch
from torch import nn

from sgm_engine.rewriting import acceleration
from tests.plain_networks import Network


@pytest.fixture(autouse=True)
def fixed_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network(conditional=True, channels=1, ngf=8):
    return Network(torch.logspace(0, -2, 10), channels, ngf, conditional).eval()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


X, LEVEL = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 9, 4])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Rewrites that pay on a GPU only."""
    monkeypatch.setattr(acceleration, "_is_fused_around", lambda x: True)


class Wrapped(nn.Module):
    """A network from a function of (layers, x, level)."""

    def __init__(self, run, **layers):
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), run

    def forward(self, x, level):
        return self.run(self.layers, x, level)


class Float32GroupNorm(nn.GroupNorm):
    """As diffusion code often has it."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)
