"""What the tests of graphs share."""

import torch
from torch import nn

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.graphs import GraphExecutor
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.plans.schedule import geometric
from tests.fake_graphs import FakeGraphs

SIGMAS = geometric(1, 0.1, 3)


SHAPE = (1, 8, 8)


PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)


def small_net(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8, **options).eval()


def graph_engine(model, **options):
    """An engine on the graph executor with a fake backend."""
    engine = eager_engine(model, **options)
    engine._bind(GraphExecutor(FakeGraphs()))
    return engine


def eager_engine(model, batch=4, **options):
    return Engine(model, batch, executor="eager", **options)


class Tiny(nn.Module):
    """A few operations in place of a network."""

    sigmas, shape = SIGMAS, SHAPE

    def __init__(self):
        super().__init__()
        self.end_conv = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.constant_(self.end_conv.weight, -0.1)
        self.end_conv.weight.data[0, 0, 0, 1] = 0.3  # not its own transpose
        self.register_buffer("variance", torch.tensor(SIGMAS, dtype=torch.float32) ** 2)

    def forward(self, x, level):
        return self.end_conv(x) / self.variance[level][:, None, None, None]


def _replace(net):
    net.end_conv.weight = nn.Parameter(net.end_conv.weight.detach() * 2)


def _move(net):
    net.end_conv.weight.data = net.end_conv.weight.data * 2
