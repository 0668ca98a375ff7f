"""What the tests of native share."""

import torch
from torch import nn

from sgm_engine.executors.native.graph import Graph


def relative_error(y, want):
    return ((y.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def identity(channels):
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(channels)[:, :, None, None])
    return conv


def run_layers(emit, x, level=None, precision="float32"):
    """What the layers that ``emit(graph, value)`` builds make of x; its result is read through an exact identity."""
    graph = Graph(len(x), precision)
    out = emit(graph, graph.load(*x.shape[1:]))
    graph.store(out, identity(out.channels))
    graph.plan()
    level = torch.zeros(len(x), dtype=torch.int64) if level is None else level
    return graph.run(x, level, torch.full((len(x), out.channels, out.height, out.width), torch.nan))
