"""``accelerate`` on NCSN and NCSNv2 written in plain PyTorch, on the CPU: ``pytest bench/test_accelerate.py``.

The result is checked first. Then calls of the two alternate in one process, and the median of the pairs' ratios of
CPU time (user's module / accelerated) is reported; above 1 is faster.
"""

import statistics
import time

import pytest
import torch

from sgm_engine import _C
from sgm_engine.rewriting.acceleration import accelerate
from tests.plain_networks import Network

SIZES = {"mnist": (1, 28, 32, 8), "cifar10": (3, 32, 32, 8)}  # channels, pixels, ngf, batch


@pytest.mark.quick
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("conditional", [True, False], ids=["NCSN", "NCSNv2"])
@torch.no_grad()
def test_accelerated(benchmark, conditional, size):
    channels, pixels, ngf, batch = SIZES[size]
    threads = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1)
    _C.set_num_threads(1)  # CPU time of the calling thread is then all the time there is
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = Network(torch.logspace(0, -2, 10), channels, ngf, conditional).eval()
            x, level = torch.rand(batch, channels, pixels, pixels), torch.arange(batch)
        fast = accelerate(plain, (channels, pixels, pixels))
        difference = ((fast(x, level) - plain(x, level)).norm() / plain(x, level).norm()).item()
        assert difference <= 2e-6
        ratios = []
        for _ in range(9):
            began = time.thread_time()
            plain(x, level)
            between = time.thread_time()
            fast(x, level)
            ratios.append((between - began) / (time.thread_time() - between))
        benchmark.extra_info["speed-up"] = round(statistics.median(ratios), 2)
        benchmark.pedantic(fast, args=(x, level), rounds=3)
        print(f"\n{size}: {statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})")
        assert statistics.median(ratios) > 1
    finally:
        torch.set_num_threads(threads[0])
        _C.set_num_threads(threads[1])
