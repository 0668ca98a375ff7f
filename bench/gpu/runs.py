"""The two commands for a GPU that is new: what matters most first, each stage cut off when its time is over.

Together they take 13 minutes at most. Each builds, which takes seconds where the last build is still there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from bench.gpu.checks import build, tests
from bench.gpu.convolutions import SHAPES as TUNED
from bench.gpu.convolutions import Work, convolutions
from bench.gpu.kernels import backends
from bench.gpu.network import core, step_times
from bench.gpu.sanitize import sanitize
from bench.gpu.stages import Row

END_S = 20  # of a command's time, for what is stopped to end and for the results
Stages = dict[str, Callable[[], Iterable[Row]]]


class Run(NamedTuple):
    """seconds: of the command. limits: of each stage, while another follows. stages: of (architecture, folder)."""

    seconds: float
    limits: dict[str, float]
    stages: Callable[[str, Path], Stages]


def first(arch: str, folder: Path) -> Stages:
    """Is it right, and how fast is a step against its peers?"""
    return {
        "build": partial(build, arch),
        "compile": partial(_step_compiled, int(arch)),
        "core": partial(step_times, core),
        "tests": partial(tests, folder),
    }


def second(arch: str, folder: Path) -> Stages:
    """Which kernel for which shape: the tables. And what a sanitizer says of CUDA C++."""
    return {
        "build": partial(build, arch),
        "compile": partial(_timed_compiled, int(arch)),
        "convolutions": lambda: convolutions(work()),
        "backends": partial(backends, NORMS, BATCHES),
        "sanitize": partial(sanitize, folder, ("cuda",), ("memcheck", "racecheck")),
    }


SHAPES = TUNED[:4]  # 93% of the operations of a step
NORMS = [(128, 32), (256, 16)]
BATCHES = (128, 1)
RUNS = {
    "first": Run(560, {"build": 150, "compile": 60, "core": 300, "tests": math.inf}, first),
    "second": Run(220, {"build": 70, "compile": 30, "convolutions": 50, "backends": 35, "sanitize": math.inf}, second),
}


def work() -> Work:
    """Four tiles: by cp.async; by TMA the same, the largest, and one for few pixels."""
    from sgm_engine.kernels.triton.conv import LARGE_TILES, TILES

    return Work(SHAPES, BATCHES, (TILES[2], *LARGE_TILES[1:]), float8=False)


def _step_compiled(capability: int) -> Iterator[Row]:
    from bench.gpu import compiling

    return compiling.compiling(capability, compiling.of_step)


def _timed_compiled(capability: int) -> Iterator[Row]:
    from bench.gpu import compiling

    launches = (compiling.of_convolutions(SHAPES, work().tiles), compiling.of_backends(NORMS))
    return compiling.compiling(capability, lambda: chain(*launches))
