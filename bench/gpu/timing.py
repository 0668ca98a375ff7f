"""What is timed how, and the limits of the device that times are compared with. Tests put a fake in place of these."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch

DEVICE = "cuda"


def captured(work: Callable[[], None], warm_ups: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of ``work``, which has run before. Another graph that the collector takes meanwhile would spoil it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    finally:
        gc.enable()
    return graph


def microseconds(calls: list[Callable[[], None]], repeats: int = 20) -> float:
    """Median time of one call, from replays of a graph that makes all of ``calls`` (on different buffers) in turn."""

    def work() -> None:
        for call in calls:
            call()

    graph = captured(work)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(bytes_a_call: int) -> int:
    """Sets of buffers that together overflow the L2 cache several times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, 4 * cache // max(bytes_a_call, 1) + 1))


@cache
def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    a = torch.randn(2**28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (microseconds([lambda: b.copy_(a)]) * 1e-6)


@cache
def peak_flops() -> float:
    """Operations a second of a large bf16 matrix product, two for each multiply-add."""
    n = 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / (microseconds([lambda: torch.mm(a, b, out=out)]) * 1e-6)


def peer_step(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, level: torch.Tensor
) -> None:
    """A plain PyTorch Langevin step, in place, in float32 round a bf16 network; nothing goes to the host."""
    x.add_(score(x, level).float(), alpha=1e-5).add_(torch.randn_like(x), alpha=1e-3)


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    return captured(step, 3).replay


def milliseconds(step: Callable[[], None], budget_s: float = 2.0) -> float:
    """Median wall time of a step, blocks of steps with one synchronisation each: launch gaps count."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    block = max(1, min(100, int(budget_s / 5 / max(time.perf_counter() - began, 1e-5))))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(block):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3 / block)
    return statistics.median(times)


def kernels_of(step: Callable[[], None]) -> dict[str, tuple[int, float]]:
    """Kernel → (launches, milliseconds in which it ran) of one call, as the profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, spent = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, spent + event.device_time / 1e3
    return found
