"""What the benchmarks share: the bandwidth of a copy, the ratio of two functions, and where a figure comes from.

Nothing here compares a time with one of another run: the machine's speed drifts. Ratios come from interleaved pairs.
"""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """seconds of f / seconds of g: the median over pairs with a 95% bootstrap interval; above 1, g is faster."""

    median: float
    low: float
    high: float
    f_seconds: float  # median of one call
    g_seconds: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def seconds(f: Callable[[], object], calls: int, clock: Clock) -> float:
    began = clock()
    for _ in range(calls):
        f()
    return (clock() - began) / calls


def paired_ratio(
    f: Callable[[], object],
    g: Callable[[], object],
    pairs: int = 20,
    clock: Clock = time.perf_counter,
    block: float = 0.005,
) -> Ratio:
    """f's time over g's, from ``pairs`` pairs in the order f g g f, each of ``block`` seconds of calls.

    clock: time.thread_time for single-threaded work on a busy machine, wall time otherwise.
    """
    for h in (f, g):
        h(), h()  # warm up
    calls = [max(1, round(block / max(seconds(h, 1, clock), 1e-6))) for h in (f, g)]
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        order = ((0, f), (1, g)) if pair % 2 == 0 else ((1, g), (0, f))
        found = {i: seconds(h, calls[i], clock) for i, h in order}
        times.append((found[0], found[1]))
    return median_ratio(*zip(*times, strict=True))


def median_ratio(f_seconds: Sequence[float], g_seconds: Sequence[float]) -> Ratio:
    """The ratio of times taken in pairs."""
    ratios = [a / b for a, b in zip(f_seconds, g_seconds, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    medians_of_both = statistics.median(f_seconds), statistics.median(g_seconds)
    return Ratio(statistics.median(ratios), medians[25], medians[974], *medians_of_both)


def copier(megabytes: int = 256) -> tuple[Callable[[], object], int]:
    """A copy between two buffers of that size, too large for a cache, and the bytes that it reads and writes."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def copy_bandwidth(megabytes: int = 256, repeats: int = 7, clock: Clock = time.perf_counter) -> float:
    """Bytes read and written a second by torch's copy, on torch.get_num_threads() threads: the median."""
    copy, size = copier(megabytes)
    copy()
    return size / statistics.median(seconds(copy, 1, clock) for _ in range(repeats))


def about(device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, str]:
    """extra_info of a benchmark: device, dtype, versions, commit."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else _cpu_name()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    info = {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}
    return info | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})


def _cpu_name() -> str:
    from sgm_engine import _C

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {_C.isa()}"
