"""3×3 layers on lesser instruction sets, against oneDNN limited to the same: ``pytest bench/test_isa.py -s``.

Each set in a process of its own, since oneDNN reads its limit once; there the two take turns on one thread, and the
ratio is of CPU time: above 1, we are faster.
"""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.common import paired_ratio
from bench.stacks import native, onednn, stack
from sgm_engine import _C

PEERS = {"generic": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}  # oneDNN has no SSE2 code
LAYERS = {  # of NCSN on CIFAR-10, on MNIST, and of a small network: channels, pixels, dilation
    "128 at 32²": (128, 32, 1),
    "256 at 16²": (256, 16, 1),
    "256 at 16², dilation 2": (256, 16, 2),
    "64 at 28²": (64, 28, 1),
    "32 at 14²": (32, 14, 1),
}
BATCH, FLOOR = 4, 1.8  # the goal is 2, and met; a gate leaves room for a noisy machine


def measure() -> dict[str, tuple[float, float, float]]:
    torch.set_num_threads(1), _C.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    for name, (channels, pixels, dilation) in LAYERS.items():
        model, x = stack(channels, dilation), torch.randn(BATCH, 1, pixels, pixels)
        (ours, _), theirs = native(model, x, "float32"), onednn(model, x)
        want = copy.deepcopy(model).double()(x.double())
        assert all((f().double() - want).norm() / want.norm() < 1e-5 for f in (ours, theirs)), name
        ratio = paired_ratio(theirs, ours, 7, time.thread_time, block=0.05)
        found[name] = ratio.median, ratio.low, ratio.high
    return found


@pytest.mark.parametrize("isa", [isa for isa in PEERS if isa in _C.isas()])
def test_against_onednn_on_the_same_instructions(benchmark, isa):
    limits = {"SGM_ISA": isa, "ONEDNN_MAX_CPU_ISA": PEERS[isa], "OMP_NUM_THREADS": "1", "SGM_NUM_THREADS": "1"}
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "bench.test_isa"], capture_output=True, text=True,
        cwd=Path(__file__).parents[1], env=os.environ | limits, check=True,
    )  # fmt: skip
    found = json.loads(benchmark.pedantic(run, rounds=1).stdout)
    benchmark.extra_info.update({name: round(median, 2) for name, (median, _, _) in found.items()})
    for name, (median, low, high) in found.items():
        print(f"\n{isa}, {name}: oneDNN's time over ours {median:.2f} [{low:.2f}, {high:.2f}]", end="")
    assert min(high for _, _, high in found.values()) > FLOOR


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)
