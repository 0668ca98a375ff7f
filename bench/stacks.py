"""Stacks of equal 3×3 convolutions, for benchmarks of one kind of layer: ours, and oneDNN's with packed weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sgm_engine.executors.native.graph import Graph

LAYERS = 4


def stack(channels: int, dilation: int = 1, layers: int = LAYERS) -> nn.Sequential:
    """One channel in, ``layers`` convolutions channels → channels, one channel out."""
    widths = [1, *[channels] * (layers + 1), 1]
    dilations = [1, *[dilation] * layers, 1]
    pairs = zip(widths, widths[1:], dilations, strict=False)
    model = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=d, dilation=d) for a, b, d in pairs))
    for conv in model:
        nn.init.normal_(conv.weight, std=(conv.in_channels * 9) ** -0.5)
    return model.eval().requires_grad_(False)


def native(model: nn.Sequential, x: Tensor, precision: str) -> tuple[Callable[[], Tensor], str]:
    """A call of the native executor, and the algorithm of the stack's convolutions."""
    graph = Graph(len(x), precision)
    value = graph.load(*x.shape[1:])
    for conv in model[:-1]:
        value = graph.conv(value, conv)
    graph.store(value, model[-1])
    graph.plan()
    level, score = torch.zeros(len(x), dtype=torch.int64), torch.empty_like(x)
    return lambda: graph.run(x, level, score), graph.native.algorithm(graph.convs[1]).split()[0]


def onednn(model: nn.Sequential, x: Tensor) -> Callable[[], Tensor]:
    """torch.ops.mkldnn: channels_last, weights packed beforehand."""
    x = x.contiguous(memory_format=torch.channels_last)
    packed, h = [], x
    for conv in model:
        arguments = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *arguments, list(h.shape))
        packed.append((weight, conv.bias, *arguments, "none", [], ""))
        h = torch.ops.mkldnn._convolution_pointwise(h, *packed[-1])

    def call() -> Tensor:
        h = x
        for arguments in packed:
            h = torch.ops.mkldnn._convolution_pointwise(h, *arguments)
        return h

    return call
