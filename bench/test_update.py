"""The Langevin update on the CPU against PyTorch: ``pytest bench/test_update.py``.

Each case checks the result first, then reports ratios, above 1 where the kernel is faster: eager (x + α·s + c·randn)
and compiled (torch.compile of the same formula), and fails below 3 and 1. share of copy: the time of a copy of as many
bytes as the update must move, from buffers that no cache holds, over the update's time. Making the noise, not memory,
is the limit here: quiet is the share of a row without noise.
"""

import time

import pytest
import torch

from bench.common import about, copier, paired_ratio
from sgm_engine.kernels import ops, reference
from sgm_engine.kernels.arguments import Update

SHAPES = ((32, 128, 32, 32), (32, 256, 16, 16), pytest.param((32, 64, 28, 28), marks=pytest.mark.quick))
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
STEP, NOISE = 1e-3, 0.04


def formula(x, score):
    return x + STEP * score + NOISE * torch.randn_like(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(benchmark, shape, layout, dtype, threads):
    x, score = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in "xs")
    score = score.to(dtype)
    coef = torch.tensor([[1.0, STEP, NOISE, 0.0], [1.0, STEP, 0.0, 0.0]])
    draw, ids = torch.tensor([1, 2], dtype=torch.int32), torch.arange(shape[0])
    rows = [torch.full_like(ids, row) for row in (0, 1)]
    stop, bad_row = ids + 2, torch.full_like(ids, ops.NO_BAD_ROW)

    z = reference.noise(shape, ids, ids, 1)
    result = ops.langevin_update(x, score, coef, draw, rows[0], ids, ids)
    torch.testing.assert_close(result, reference.langevin_update(x, score, coef, rows[0], z), rtol=0, atol=1e-6)

    def update(row):  # in place, as the engine runs it
        launch(Update(state, score, coef, draw, row, stop, ids, ids, bad_row, None, state, False))

    launch, state = ops.launchers("cpu").langevin_update, x.clone()
    ours, quiet = (lambda row=row: update(row) for row in rows)
    torch._dynamo.reset()
    fused = torch.compile(formula, dynamic=False)
    clock = time.thread_time if threads == 1 else time.perf_counter
    with torch.no_grad():
        eager = paired_ratio(lambda: formula(x, score), ours, clock=clock)
        compiled = paired_ratio(lambda: fused(x, score), ours, pairs=6, clock=clock)
        copy, copied = copier()
        moved = 2 * x.nbytes + score.nbytes
        share, quiet_share = (paired_ratio(copy, f, clock=clock).median * moved / copied for f in (ours, quiet))
        benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
    ratios = {
        "eager": str(eager),
        "compiled": str(compiled),
        "share of copy": round(share, 2),
        "quiet": round(quiet_share, 2),
    }
    benchmark.extra_info |= about(dtype=dtype) | {"threads": threads} | ratios
    print(f"\n{shape} {layout} {dtype} {threads}t: {ratios}")
    assert eager.high >= 3, f"only {eager} times as fast as eager PyTorch"
    assert compiled.high > 1, f"only {compiled} times as fast as torch.compile"


ROWS = {  # (a, b, c, d), (e, f)
    "Langevin": ((1.0, 1e-3, 0.04, 0.0), (0.0, 0.0)),
    "ancestral": ((1.0, 0.7, 0.3, 0.0), (0.0, 0.0)),
    "SDE-DPM-Solver++(2M)": ((0.8, 0.7, 0.3, -0.2), (1.0, 0.5)),
    "DDIM": ((1.0, 0.7, 0.0, 0.0), (0.0, 0.0)),
    "Heun 2": ((0.0, 0.2, 0.0, 1.0), (0.0, 0.0)),
    "DPM-Solver++(2M)": ((0.8, 0.7, 0.0, -0.2), (1.0, 0.5)),
}


@pytest.mark.quick
def test_every_row_costs_the_same(threads):
    """Rows with noise cost what Langevin's costs, ±5 %, and rows without what DDIM's does; history adds its bytes."""
    shape = (32, 3, 32, 32)
    x, score, previous = (torch.randn(shape) for _ in range(3))
    ids, draw = torch.arange(shape[0]), torch.tensor([1], dtype=torch.int32)
    row, stop, bad_row = torch.zeros_like(ids), ids * 0 + 1, torch.full_like(ids, ops.NO_BAD_ROW)
    launch, state = ops.launchers("cpu").langevin_update, x.clone()

    def step(coef, keep):
        history = (previous, state, False, keep) if coef[0, 3] or keep.any() else (None, state, False)
        return lambda: launch(Update(state, score, coef, draw, row, stop, ids, ids, bad_row, *history))

    steps = {name: step(torch.tensor([coef]), torch.tensor([keep])) for name, (coef, keep) in ROWS.items()}
    clock = time.thread_time if threads == 1 else time.perf_counter
    ratios = {}
    for name, call in steps.items():
        base = "Langevin" if ROWS[name][0][2] else "DDIM"
        ratios[name] = paired_ratio(call, steps[base], pairs=40, clock=clock)
        state.copy_(x)
    print("\n" + ", ".join(f"{name}: {ratio}" for name, ratio in ratios.items()))
    for name in ("Langevin", "ancestral", "DDIM"):
        assert ratios[name].low <= 1.05 and ratios[name].high >= 0.95, (name, ratios[name])
    if threads == 1:
        assert ratios["SDE-DPM-Solver++(2M)"].low <= 1.25, "a row with history and noise moves 5 tensors, not 3"
