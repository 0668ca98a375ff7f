"""bfloat16 against float32 in the native executor at batch 1, where weights stream from memory: NCSN CIFAR-10.

On every instruction set of this CPU, in one process: ``pytest bench/test_bfloat16.py -s``. One thread, CPU time.
"""

import time

import pytest
import torch

from bench.common import about, paired_ratio
from sgm_engine import _C
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.models import NCSN
from sgm_engine.plans.schedule import geometric

# Expanding weights takes instructions and saves 226 MiB of traffic; SSE2 multiplies too slowly to wait for memory.
FLOORS = {"generic": 0.85, "avx2": 0.95, "avx512": 1.0, "avx512_bf16": 1.3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.quick
@pytest.mark.parametrize("isa", [isa for isa in FLOORS if isa in _C.isas()])
def test_against_float32_at_batch_one(benchmark, isa):
    before = _C.isa()
    _C.set_isa(isa)
    try:
        torch.manual_seed(0)
        model = NCSN(geometric(1, 0.01, 10), channels=3, ngf=128, image_size=32).eval()
        x, level = torch.rand(1, *model.shape), torch.tensor([4])
        full, half = (NativeNetwork(model, 1, *model.shape[1:], precision) for precision in ("float32", "bfloat16"))
        want = full(x, level)
        assert 1e-4 < (half(x, level) - want).norm() / want.norm() < 5e-2
        ratio = paired_ratio(lambda: full(x, level), lambda: half(x, level), 9, time.thread_time, block=0.05)
        benchmark.pedantic(lambda: half(x, level), rounds=1)
    finally:
        _C.set_isa(before)
    benchmark.extra_info |= about() | {"instruction set": isa, "float32": str(ratio)}
    print(f"\n{isa}: float32's time over bfloat16's {ratio}")
    assert ratio.high > FLOORS[isa]
