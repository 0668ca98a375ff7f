"""The live process of one tree: ``python -m bench.worker TREE`` starts a child for each line ``NAME`` on stdin.

A child sets the workload up, answers {"seconds": of a call} and then, for each line N, {"seconds": of a call, the mean
of N}, until an empty line ends it; one of bench.counts answers {"counts": …} and ends. {"error": why}: it cannot.
Children are forks of a process that has imported the package and called nothing: a new one costs little, and has its
memory elsewhere. What a child imports, its parent imports for those to come.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WARM_UP = 2
IMPORTED = ("torch", "sgm_engine.engine.engine")  # before the first child
Answer = Callable[..., None]


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {
    "process": time.process_time, "children": children, "wall": time.perf_counter
}  # fmt: skip


def package_of(tree: str) -> None:
    """RuntimeError unless what is imported here is this tree's package and its own C++."""
    import sgm_engine
    from sgm_engine import _C

    for module in (sgm_engine, _C):
        if Path(tree).resolve() not in Path(module.__file__).resolve().parents:
            raise RuntimeError(f"{module.__name__} is that of {module.__file__}, not of {tree}")


def memory() -> dict[str, int]:
    """Bytes of this process: resident, and the most that ever were."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {what: 1024 * int(lines[key].split()[0]) for what, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def shuffled_heap() -> list:
    """What keeps holes of 1 KB to 4 MB apart: no two buffers lie at the same distance in two children.

    Distances decide which cache lines meet, and the children of one process would inherit them.
    """
    import torch

    sizes = [int(2 ** random.uniform(10, 22)) for _ in range(64)]
    return [torch.empty(size, dtype=torch.uint8) for size in sizes][::2]


def serve(name: str, read: Callable[[], str], answer: Answer) -> None:
    """What a child does."""
    import torch

    from bench.counts import COUNTS
    from bench.workloads import WORKLOADS
    from sgm_engine import _C

    gc.enable()
    workload = WORKLOADS.get(name) or COUNTS[name]
    torch.set_num_threads(workload.threads)
    _C.set_num_threads(workload.threads)
    if name in COUNTS:
        before = memory()["resident"] if workload.memory else 0
        found = workload.make()
        return answer(counts={k: v - before for k, v in memory().items()} if workload.memory else found)
    _kept = shuffled_heap()
    call, clock = workload.make(), CLOCKS[workload.clock]

    def turn(calls: int) -> float:
        began = clock()
        for _ in range(calls):
            call()
        return (clock() - began) / calls

    call()
    answer(seconds=min(turn(1) for _ in range(WARM_UP)))
    while line := read().strip():
        calls = int(line)
        if calls > 1:  # the other process has had the caches
            call()
        answer(seconds=turn(calls))


def main(tree: str) -> None:
    channel, source = os.fdopen(os.dup(1), "w"), open(0, "rb", buffering=0)  # noqa: SIM115 - children read on from it
    os.dup2(2, 1)  # what a workload prints is none of the answers

    def read() -> str:
        return source.readline().decode()

    def answer(**what: object) -> None:
        print(json.dumps(what), file=channel, flush=True)

    gc.disable()  # a fifth of what the imports would take
    try:
        package_of(tree)
        for module in IMPORTED:
            importlib.import_module(module)
    except Exception as error:
        return answer(error=f"{type(error).__name__}: {error}"[:300])
    answer(ready=tree)
    while line := read():
        if not (name := line.strip()):
            continue  # for a child that has ended already
        tempfile.tempdir = None
        tempfile.tempdir = tempfile.mkdtemp(prefix="sgm-bench-", dir=shared_memory())
        imported = Path(tempfile.tempdir, "imported")
        gc.freeze()
        child = os.fork()
        if not child:
            try:
                serve(name, read, answer)
                imported.write_text("\n".join(sys.modules))
            except BaseException as error:  # an older revision may lack what the workload needs: the other end decides
                answer(error=f"{type(error).__name__}: {error}"[:300])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        for module in imported.read_text().splitlines() if imported.exists() else ():
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        if status:
            answer(error=f"it ended with status {status}")


def shared_memory() -> str | None:
    """A disk is not what is timed."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    main(*sys.argv[1:])
