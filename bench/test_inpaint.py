"""Inpainting on one CPU thread, CPU time: known pixels imposed by the update itself against two ops more a step.

Each case checks the result first, then reports ratios of times. before: two ops and an update, over the fused update.
update: the fused update over one without known pixels. eager, sample: the eager executor's chain, and one without known
pixels, over the native executor's.
"""

import math
import time

import pytest
import torch

from bench.common import about, paired_ratio
from sgm_engine import annealed_langevin
from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.native.executor import NativeExecutor
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Job, Slots, Tables
from sgm_engine.kernels import ops
from sgm_engine.kernels.arguments import Update
from sgm_engine.kernels.noise import STREAM
from sgm_engine.models import NCSN
from sgm_engine.plans.schedule import geometric

MASKS = {  # of [H, W] pixels
    "half": lambda h, w: (torch.arange(h) < h // 2)[:, None].expand(h, w),
    "box": lambda h, w: ~((torch.arange(h)[:, None] // (h // 4) % 3 > 0) & (torch.arange(w) // (w // 4) % 3 > 0)),
    "scattered": lambda h, w: torch.rand(h, w, generator=torch.Generator().manual_seed(0)) > 0.5,
}


pytestmark = pytest.mark.usefixtures("one_thread")


class TwoOps:
    """How known pixels were imposed before each update: x ← known + σ·z where the mask is set."""

    def __init__(self, known, mask, sigma, draw, row, seed, sample_id):
        self.known, self.mask, self.z = known.nan_to_num(nan=0.0), mask, torch.empty_like(known)
        self.sigma, self.draw, self.row, self.ids = sigma, draw, row, (seed, sample_id)

    def __call__(self, x):
        row = int(self.row[0])  # of every slot
        ops.noise_fill_(self.z, *self.ids, int(self.draw[row]), STREAM["inpaint"], "normal")
        torch.where(self.mask, self.known + self.sigma[row] * self.z, x, out=x)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(32, 3, 32, 32), pytest.param((32, 1, 28, 28), marks=pytest.mark.quick)], ids=str)
def test_fused_update(benchmark, shape, mask):
    x, score, known = (torch.randn(shape) for _ in range(3))
    where = MASKS[mask](*shape[2:]).expand(shape)
    known = known.where(where, math.nan)
    coef, sigma = torch.tensor([[1.0, 1e-3, 0.04, 0.0]] * 2), torch.tensor([0.5, 0.5])
    draw, known_draw, ids = *torch.tensor([[1, 2], [2, 3]], dtype=torch.int32), torch.arange(shape[0])
    row, bad_row = torch.zeros_like(ids), torch.full_like(ids, ops.NO_BAD_ROW)
    slots = (row, row + 2, ids, ids, bad_row)
    impose = TwoOps(known, where, sigma, known_draw, row, ids, ids)
    update = ops.launchers("cpu").langevin_update

    def run(state, *inpaint):
        update(Update(state, score, coef, draw, *slots, None, state, False, None, None, *inpaint))

    def two_ops(state):
        impose(state)
        run(state)

    fused, want = x.clone(), x.clone()
    run(fused, known, sigma, known_draw)
    run(want)
    impose(want)
    assert torch.equal(fused, want)

    ours = lambda: run(fused, known, sigma, known_draw)  # noqa: E731
    before = paired_ratio(lambda: two_ops(want), ours, clock=time.thread_time)
    alone = paired_ratio(ours, lambda: run(want), clock=time.thread_time)
    benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
    benchmark.extra_info |= about() | {"before": str(before), "update": str(alone)}
    print(f"\n{shape} {mask}: before {before}, update {alone}")
    assert before.high > 1.1, f"only {before} times as fast as two ops more"


@pytest.mark.parametrize(
    "ngf, size", [(4, 8), pytest.param(32, 28, marks=pytest.mark.quick)], ids=["ngf 4, 8×8", "ngf 32, 28×28"]
)
def test_chain(benchmark, ngf, size):
    """Rows of one chain of 4 slots in one native call, against a native call a row with two ops between, and eager."""
    torch.manual_seed(0)
    sigmas, cpu, batch = geometric(1, 0.1, 4), torch.device("cpu"), 4
    model = NCSN(sigmas, channels=1, ngf=ngf, divide_by_sigma=True, image_size=size).eval()
    plan, shape, network = annealed_langevin(sigmas, 4, 1e-4), model.shape, Network(model, "float32", cpu)
    where = MASKS["half"](size, size).expand(batch, *shape)
    known = torch.rand(batch, *shape).where(where, math.nan)
    executors = {name: kind() for name, kind in (("native", NativeExecutor), ("eager", EagerExecutor))}
    slots, tables = Slots(batch, shape, cpu), Tables(cpu)
    for executor in executors.values():
        executor.bind(network, slots, tables)
        executor.sync_weights()
    rows = tables.add(plan)
    slots.inpaint(known, "step")
    slots.refill(iter([Job(i, 0, plan, rows, i) for i in range(batch)]))
    start, inpainted = slots.x.clone(), slots.known
    sigma, draw = torch.tensor(plan.sigma.astype("float32")), torch.arange(1, plan.nfe + 1, dtype=torch.int32)
    impose = TwoOps(known, where, sigma, draw, slots.row, slots.seed, slots.sample_id)

    def chain(executor, by_two_ops=False, known=inpainted):
        slots.x.copy_(start), slots.row.zero_()
        slots.known = None if by_two_ops else known
        if by_two_ops:
            for _ in range(plan.nfe):
                impose(slots.x)
                executors[executor].run(1)
        else:
            executors[executor].run(plan.nfe)
        return slots.x

    got = chain("native").clone()
    assert torch.equal(torch.where(where, known, chain("native", by_two_ops=True)), got)
    torch.testing.assert_close(chain("eager"), got, rtol=1e-4, atol=1e-4)
    ours = lambda: chain("native")  # noqa: E731
    others = {
        "before": lambda: chain("native", by_two_ops=True),
        "eager": lambda: chain("eager"),
        "sample": lambda: chain("native", known=None),
    }
    ratios = {name: paired_ratio(f, ours, 15, time.thread_time, block=0.1) for name, f in others.items()}
    benchmark.pedantic(ours, rounds=3)
    benchmark.extra_info |= about() | {name: str(ratio) for name, ratio in ratios.items()}
    print(f"\nngf {ngf}, {size}×{size}: {', '.join(f'{name} {ratio}' for name, ratio in ratios.items())}")
    assert ratios["before"].high > 1 and ratios["eager"].low > 1
