"""Time workloads in this process, one thread: ``python -m bench.measure [NAME …]`` prints JSON: seconds a call.

CPU time of the calling thread, so that a busy machine costs little; the fastest of many blocks, so that what is left of
its noise (a cold cache, a stolen core) drops out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from bench.workloads import WORKLOADS

BLOCK_SECONDS, BLOCKS = 0.02, 8


def seconds_a_call(call: Callable[[], object], block: float = BLOCK_SECONDS, blocks: int = BLOCKS) -> float:
    for _ in range(3):
        call()
    began = time.thread_time()
    call()
    repeats = max(1, round(block / max(time.thread_time() - began, 1e-7)))
    fastest = float("inf")
    for _ in range(blocks):
        began = time.thread_time()
        for _ in range(repeats):
            call()
        fastest = min(fastest, (time.thread_time() - began) / repeats)
    return fastest


def main(names: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    result: dict[str, float | str] = {}
    for name in names or WORKLOADS:
        try:
            result[name] = seconds_a_call(WORKLOADS[name]())
        except Exception as error:  # an older revision may lack what the workload needs; the caller decides
            result[name] = f"{type(error).__name__}: {error}"
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
