"""What the tests of native share."""

import torch
from torch import nn

from sgm_engine.executors.native.graph import Graph


def relative_error(y, want):
    return ((y.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def bits_of_any_threads(network, x, level, threads, numbers=(1, 2, 3)):
    """What it makes of x: the same for these numbers of threads, and of images 0 and 7 alone."""
    want = None
    for n in numbers:
        threads(n)
        y = network(x, level)
        want = y if want is None else want
        assert torch.equal(y, want)
        for i in (0, 7):  # alone, so that with several threads a team shares one image
            assert torch.equal(network(x[i : i + 1], level[i : i + 1])[0], want[i])
    return want


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
