"""Attention against scaled_dot_product_attention, on one thread: ``pytest bench/test_attention.py -s``.

PyTorch gets q, k and v as [B, heads, pixels, size], which its convolutions would have to be permuted into; ours reads
and writes pixels as the layers around it do, loading and a last layer of one channel included.
"""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.common import paired_ratio
from sgm_engine import _C
from sgm_engine.executors.native.graph import Graph

LEAST = 1.1  # times faster, with AVX-512
LAYERS = 4
CASES = [
    (8, 8, 14, 8),
    (4, 32, 16, 8),
    (4, 64, 8, 8),
    (4, 64, 32, 1),
    (1, 256, 16, 1),
]  # heads, size, pixels a side, batch

pytestmark = pytest.mark.usefixtures("one_thread")


def native(heads, size, x, layers, last):
    graph, channels = Graph(len(x), "float32"), heads * size
    value = graph.load(*x.shape[1:])
    outs = [graph.attention(value, channels, heads) for _ in range(layers)]
    graph.store(outs[-1], last)
    graph.plan()
    score, level = torch.empty(len(x), last.out_channels, *x.shape[2:]), torch.zeros(len(x), dtype=torch.int64)
    return lambda: graph.run(x, level, score)


@pytest.mark.skipif(not _C.isa().startswith("avx512"), reason="the gate is of AVX-512")
def test_attention(benchmark):
    torch.manual_seed(0)
    slow = []
    for heads, size, side, batch in CASES:
        x, channels = torch.randn(batch, 3 * heads * size, side, side), heads * size
        q, k, v = (part.unflatten(1, (heads, size)).flatten(3).mT.contiguous() for part in x.chunk(3, 1))
        want = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2).unflatten(2, (side, side))
        identity = nn.Conv2d(channels, channels, 1, bias=False).requires_grad_(False)
        identity.weight.copy_(torch.eye(channels)[:, :, None, None])
        assert (native(heads, size, x, 1, identity)() - want).norm() < 1e-5 * want.norm()
        ours = native(heads, size, x, LAYERS, nn.Conv2d(channels, 1, 1).requires_grad_(False))
        theirs = lambda: [F.scaled_dot_product_attention(q, k, v) for _ in range(LAYERS)]  # noqa: B023, E731
        ratio = paired_ratio(theirs, ours, 7, time.thread_time, block=0.02)
        name = f"{heads} heads of {size} at {side}², B={batch}"
        print(f"\n{name}: {ratio} times faster", end="")
        benchmark.extra_info[name] = round(ratio.median, 2)
        if ratio.high < LEAST:
            slow.append((name, ratio.median))
    benchmark.pedantic(lambda: None, rounds=1)
    assert not slow
