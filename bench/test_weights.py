"""What shared weights cost: looking at them, and packing what changed. One table: pytest bench/test_weights.py -s"""

import os
import threading
import time

import pytest
import torch

from bench.common import about
from sgm_engine import _C
from sgm_engine.engine.engine import Engine
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.executors.watch import Watch
from sgm_engine.models import NCSN
from sgm_engine.plans.schedule import geometric

pytestmark = pytest.mark.usefixtures("one_thread")


def least(call, before=lambda: None, rounds=5, clock=time.thread_time):
    """Milliseconds of CPU time of the caller, the least of some rounds."""
    found = []
    for _ in range(rounds):
        before()
        began = clock()
        call()
        found.append(1000 * (clock() - began))
    return min(found)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NCSN(geometric(1, 0.01, 10), channels=3, ngf=128, image_size=32).eval()


def test_what_changed_weights_cost(benchmark, model):
    parameters = list(model.parameters())
    x, level, rows = torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64), []

    @torch.no_grad()
    def all_change():
        torch._foreach_mul_(parameters, 1.0001)

    @torch.no_grad()
    def one_changes():
        model.res3[0].conv1.weight.mul_(1.0001)

    watch = Watch(model)
    rows.append(("a glance: objects, versions, optimizer steps; every chunk", least(watch.glance)))
    memory = [(t.data_ptr(), t.nbytes) for t in watch.tensors]
    look = least(watch.look, rounds=50)
    rows.append(("a look: the digest of every tensor; where samples begin, and every 16 steps", look))
    rows.append(("of it reading the memory", least(lambda: _C.digest(memory), rounds=50)))
    _C.set_num_threads(len(os.sched_getaffinity(0)))
    together = least(watch.look, rounds=50, clock=time.perf_counter)
    rows.append((f"the same look by the clock, {_C.num_threads()} threads", together))
    _C.set_num_threads(1)
    pack = {}
    for executor, precision in (("native", "float32"), ("hybrid", "float32"), ("eager", "bfloat16")):
        engine = Engine(model, 1, executor=executor, precision=precision)
        sync, name = engine._executor.sync_weights, f"{executor}, {precision}"
        sync()
        rows.append((f"{name}: nothing changed", least(sync, rounds=50)))
        rows.append((f"{name}: one convolution changed", least(sync, one_changes)))
        pack[executor] = least(sync, all_change)
        rows.append((f"{name}: every weight changed", pack[executor]))
        if executor == "native":
            evaluation = least(lambda engine=engine: engine._executor.network(x, level))
            rows.append((f"{name}: one evaluation of one image, to compare with", evaluation))
            proof = least(lambda engine=engine: engine._witness.disagreement(engine._executor))
            rows.append((f"{name}: the proof, where a request begins", proof))
    benchmark.pedantic(watch.look, rounds=3)
    benchmark.extra_info |= about() | {what: round(ms, 2) for what, ms in rows}
    millions = sum(p.numel() for p in parameters) / 1e6
    print(f"\n{millions:.1f} million parameters, one thread, {_C.isa()}\n\n| | CPU ms |\n|---|---|")
    print("\n".join(f"| {what} | {ms:.2f} |" for what, ms in rows))
    assert look < evaluation, "the check costs more than an evaluation"
    assert pack["native"] < 12 * evaluation, "packing again costs more than it did before it was parallel"


def test_packing_beside_a_run_saves_nothing(benchmark, model):
    """A second set of packed weights, made by another thread while the first one runs: the same CPU time in all.

    The pool's threads pack and run on every core, so time that is not saved is time that the run has less of.
    """
    runs, packs = (NativeNetwork(model, 1, 32, 32) for _ in range(2))
    x, level = torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)

    def run():
        for _ in range(4):
            runs(x, level)

    def one_after_another():
        packs.sync(force=True)
        run()

    def beside():
        thread = threading.Thread(target=packs.sync, kwargs={"force": True})
        thread.start()
        run()
        thread.join()

    serial, both = (least(call, clock=time.process_time) for call in (one_after_another, beside))
    memory = packs.graph.native.bytes() / 2**20
    benchmark.pedantic(beside, rounds=3)
    benchmark.extra_info |= about() | {"serial": round(serial), "beside": round(both), "MiB more": round(memory)}
    print(f"\npack, then 4 evaluations: {serial:.0f} ms of CPU; side by side: {both:.0f} ms, and {memory:.0f} MiB more")
    assert both > 0.9 * serial, "packing in the background would pay"
