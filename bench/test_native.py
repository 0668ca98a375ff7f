"""A floor for the native CPU executor: one evaluation of a small NCSN against eager PyTorch, one thread, CPU time.

The table against every peer is bench/test_peers.py's.
"""

import time

import pytest
import torch

from bench.common import about, paired_ratio
from bench.peers import eager, plain
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.models import NCSN
from sgm_engine.plans.schedule import geometric

BATCH = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.quick
def test_against_eager(benchmark):
    torch.manual_seed(0)
    model = NCSN(geometric(1, 0.01, 10), channels=1, ngf=32, image_size=28).eval()
    x, level = torch.rand(BATCH, *model.shape), torch.arange(BATCH) % 10
    native = NativeNetwork(model, BATCH, *model.shape[1:])
    with torch.no_grad():
        want = plain(model).double()(x.double(), level)
    assert ((native(x, level).double() - want).norm() / want.norm()).item() < 5e-6
    ratio = paired_ratio(
        eager(model, x, level, "float32", 1), lambda: native(x, level), 9, time.process_time, block=0.05
    )
    benchmark.pedantic(lambda: native(x, level), rounds=3)
    benchmark.extra_info |= about() | {"eager": str(ratio), "NFE/s": round(BATCH / ratio.g_seconds, 1)}
    print(f"\none evaluation, ngf 32, 28×28, B = {BATCH}: {ratio} times as fast as eager")
    assert ratio.low > 1.5
