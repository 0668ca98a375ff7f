"""Networks that are no NCSN against PyTorch eager, on one thread: native, and hybrid where there is a gate.

``pytest bench/test_hybrid.py -s``. The result is checked first; ratios are of CPU time, eager's over ours.
"""

import time

import pytest
import torch

from bench.common import paired_ratio
from sgm_engine.executors.hybrid import HybridNetwork
from sgm_engine.executors.native.executor import NativeNetwork
from tests.native.test_native_traced import SIGMAS, UNet, model_of, with_shape
from tests.plain_networks import Network

MODELS = {
    "U-Net 64 at 32²": lambda: with_shape(model_of(UNet, 64), (3, 32, 32)),
    "U-Net 64 at 16², a gate": lambda: with_shape(model_of(UNet, 64, True), (3, 16, 16)),
    "NCSN 32 at 28²": lambda: with_shape(model_of(Network, SIGMAS, 1, 32, True), (1, 28, 28)),
    "NCSNv2 32 at 32²": lambda: with_shape(model_of(Network, SIGMAS, 3, 32, False), (3, 32, 32)),
}
FLOORS = {"native": 1.3, "hybrid": 1.0}


@pytest.mark.quick
@pytest.mark.parametrize("executor", FLOORS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_against_eager(benchmark, one_thread, name, executor):
    model = MODELS[name]()
    if executor == "native" and "gate" in name:
        pytest.skip("the native executor refuses its gate: a mean over several dimensions")
    x, level = torch.rand(4, *model.shape), torch.arange(4)
    ours = NativeNetwork(model, 4, *model.shape[1:]) if executor == "native" else HybridNetwork(model, model.shape)
    want = model(x, level)
    assert (ours(x, level) - want).norm() < 1e-4 * want.norm()
    ratio = paired_ratio(lambda: model(x, level), lambda: ours(x, level), 9, time.thread_time, block=0.05)
    benchmark.extra_info["ratio"] = str(ratio)
    benchmark.pedantic(lambda: ours(x, level), rounds=1)
    print(f"\n{name}, {executor}: eager's time over ours {ratio}")
    assert ratio.high > FLOORS[executor]
