"""Whether the executor chooses the better algorithm of a 3×3 layer: ``pytest bench/test_cost_model.py -s``.

Winograd and direct take turns on one thread; the one that ``precision="float32"`` chooses may take at most 15% more CPU
time than the other. A few cases lie where the two are equal: there either is right.
"""

import time
from itertools import product

import pytest
import torch

from bench.common import paired_ratio
from bench.stacks import native, stack
from sgm_engine import _C

WORSE = 1.15
# Winograd wins by a third here, where a few layers' weights stay in the cache. In a network they do not: NCSN of 64
# channels at 8², B = 1, took 1.5 times as long when its layers at 4² were Winograd's.
HOT = {(64, 4, 1, 1)}
GRID = [  # channels, pixels, dilation, batch
    *product((16, 64, 256), (4, 8, 16), (1, 2, 4), (1, 8)),
    *product((32, 128), (7, 14, 28), (1,), (1, 8)),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("isa", _C.isas()[-1:])
def test_the_choice_is_near_the_better(benchmark, isa):
    torch.manual_seed(0)
    wrong = []
    for channels, pixels, dilation, batch in GRID:
        model, x = stack(channels, dilation), torch.randn(batch, 1, pixels, pixels)
        calls = {name: native(model, x, name)[0] for name in ("winograd", "direct")}
        chosen = native(model, x, "float32")[1]
        other = "direct" if chosen == "winograd" else "winograd"
        assert (calls[chosen]() - calls[other]()).norm() < 1e-5 * calls[chosen]().norm()
        ratio = paired_ratio(calls[chosen], calls[other], 7, time.thread_time, block=0.02)
        verdict = "" if ratio.low <= WORSE else "  WRONG"
        print(
            f"\n{channels} at {pixels}², dilation {dilation}, B={batch}: {chosen}, {ratio} of {other}{verdict}", end=""
        )
        benchmark.extra_info[f"{channels} {pixels} {dilation} {batch}"] = f"{chosen} {ratio.median:.2f}"
        if verdict and (channels, pixels, dilation, batch) not in HOT:
            wrong.append((channels, pixels, dilation, batch, chosen, round(ratio.median, 2)))
    benchmark.pedantic(lambda: None, rounds=1)
    assert not wrong
