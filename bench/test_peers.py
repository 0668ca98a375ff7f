"""One network evaluation against every engine a user could pick instead: ``pytest bench/ --peers``.

A case is a network, a batch, a precision and a number of threads. All engines of a case take turns in this process, one
evaluation each, round after round; a ratio is the median over rounds of the peer's time over ours: above 1, we are
faster. One thread: CPU time of the process. Two: wall time, which wants a quiet machine. Each result is checked against
float64 first. bench/table.py keeps the rows and draws them.
"""

import os
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import families, table
from bench.common import about, median_ratio
from bench.peers import PEERS, Unavailable, plain
from sgm_engine import _C, load_bundled
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.models import NCSN, NCSNv2
from sgm_engine.plans.schedule import geometric

NETWORKS = {
    "NCSN CIFAR-10": lambda: NCSN(geometric(1, 0.01, 10), channels=3, ngf=128, image_size=32),
    "NCSN MNIST": lambda: NCSN(geometric(1, 0.01, 10), channels=1, ngf=64, image_size=28),
    "NCSNv2 CIFAR-10": lambda: NCSNv2(geometric(50, 0.01, 232), channels=3, ngf=128, image_size=32),
    "bundled MNIST": lambda: load_bundled()[0],
    **families.NETWORKS,
}
TOLERANCE = {"float32": 5e-6, "bfloat16": 5e-2}  # relative, of the whole network, against float64
DEEPER = 2  # times as much for the other families' networks
SECONDS, ROUNDS = 20, (5, 15)  # rounds of a case: as many as fit into the seconds, within these bounds


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def peak(bf16: bool, clock) -> float:
    """Floating-point operations a second of one core, registers only."""
    rounds = 1 << 18
    began = clock()
    operations = _C.multiply_adds(bf16, rounds)
    return operations / (clock() - began)


@pytest.mark.peers
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("batch", [8, 1, 32])
@pytest.mark.parametrize("network", NETWORKS)
def test_network(request, network, batch, precision, threads):
    torch.manual_seed(0)
    model = NETWORKS[network]().eval()
    channels, height, width = model.shape
    x, level = torch.rand(batch, channels, height, width), torch.arange(batch) % len(model.sigmas)
    native, tolerance = NativeNetwork(model, batch, height, width, precision), TOLERANCE[precision]
    tolerance *= DEEPER if network in families.NETWORKS else 1
    with torch.no_grad():
        want = plain(model).double()(x[:2].double(), level[:2])
        with FlopCounterMode(display=False) as flops:
            plain(model)(x, level)
    assert error(native(x, level)[:2], want) < tolerance

    calls, left_out = {"ours": lambda: native(x, level)}, {}
    wanted = request.config.getoption("--peer")
    if unknown := set(wanted) - set(PEERS):
        raise pytest.UsageError(f"--peer {unknown.pop()!r}: the peers are {', '.join(PEERS)}")
    for name, peer in PEERS.items():
        if wanted and name not in wanted:
            continue
        try:
            call = peer(model, x, level, precision, threads)
        except Unavailable as reason:
            left_out[name] = str(reason)
            continue
        assert error(call()[:2], want) < 2 * tolerance, name
        calls[name] = call
    clock = time.process_time if threads == 1 else time.perf_counter
    times, peaks = take_turns(calls, clock, lambda: peak(precision == "bfloat16", clock))

    ours = sorted(times["ours"])[len(times["ours"]) // 2]
    total = flops.get_total_flops()
    row = about(dtype=getattr(torch, precision)) | {
        "network": network,
        "batch": batch,
        "threads": threads,
        "rounds": len(peaks),
        "ms": round(ours * 1e3, 3),
        "NFE/s": round(batch / ours, 2),
        "TFLOP/s": round(total / ours / 1e12, 4),
        "share of multiply-add peak": round(total / ours / (threads * max(peaks)), 3),
        "resident MB": round(native.graph.native.bytes() / 2**20, 1),
        "ratios": {name: median_ratio(times[name], times["ours"]) for name in calls if name != "ours"},
        "left out": left_out,
    }
    table.keep(row)
    print("\n" + table.line(row))


def take_turns(calls, clock, peak) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each call, round by round, and the peak measured in each round."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: list[float] = []
    began = time.perf_counter()
    while len(peaks) < ROUNDS[0] or (len(peaks) < ROUNDS[1] and time.perf_counter() - began < SECONDS):
        order = list(calls.items())
        for name, call in order if len(peaks) % 2 == 0 else reversed(order):
            started = clock()
            call()
            times[name].append(clock() - started)
        peaks.append(peak())
    return times, peaks


@pytest.mark.peers
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_two_threads_against_one(batch):
    """Wall time: the fastest call of many, since what else runs on the second core can only add."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    torch.manual_seed(0)
    model = NETWORKS["NCSN MNIST"]().eval()
    x, level = torch.rand(batch, *model.shape), torch.arange(batch) % 10
    before = _C.num_threads()
    native = NativeNetwork(model, batch, *model.shape[1:])
    fastest = {1: float("inf"), 2: float("inf")}
    try:
        for _ in range(12):
            for threads in fastest:
                _C.set_num_threads(threads)
                native(x, level)
                for _ in range(3):
                    began = time.perf_counter()
                    native(x, level)
                    fastest[threads] = min(fastest[threads], time.perf_counter() - began)
    finally:
        _C.set_num_threads(before)
    ratio = fastest[1] / fastest[2]
    print(f"\nB={batch}: two threads {ratio:.2f} times as fast as one")
    assert ratio > 1.5, f"a second thread brings only {ratio:.2f}"
