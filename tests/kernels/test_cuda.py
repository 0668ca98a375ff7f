"""The CUDA C++ kernels, through the launchers that a GPU uses.

Every test runs twice: on a GPU, where there is one, and from the same sources on the CPU (cuda_on_host.h), where
barriers, arrivals, clusters and masks are as on the device, and so is every bit of the noise and of the update.
"""

import numpy as np
import pytest
import torch

from sgm_engine.kernels import cuda, noise
from sgm_engine.kernels.arguments import Update
from sgm_engine.kernels.ops import NO_BAD_ROW
from tests.kernels.cuda_kernels import (
    COEF,
    DRAW,
    DTYPES,
    LAYOUTS,
    bits,
    device,  # noqa: F401 - fixtures
    each_layout,
    host_library,  # noqa: F401
    plan,
    poisoned,
    tensors,
)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@each_layout
@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (1, 1, 4, 4), (3, 3, 5, 7), (2, 5, 3, 3), (1, 3, 40, 40), (2, 6, 4, 4)]
)
def test_noise_is_the_definition(device, shape, layout, kind):
    seed = torch.tensor([-(2**63), 2**63 - 1, 12345])[: shape[0]]
    sample_id = torch.tensor([2**56 - 1, 0, 2**32])[: shape[0]]
    out = poisoned(shape, layout, device=device)
    cuda.noise_fill(out, seed.to(device), sample_id.to(device), 2**32 - 1, noise.STREAM["user"], kind)
    want = noise.fill(shape, seed.numpy(), sample_id.numpy(), 2**32 - 1, noise.STREAM["user"], kind)
    assert (bits(out) == want.view(np.uint32)).all()


def slots(batch, rows=4):
    return {
        "row": torch.arange(batch) % rows,
        "seed": torch.arange(batch) * 7919 - 3,
        "sample_id": torch.arange(batch) * 2**40 + 5,
    }


def definition(x, score, row, seed, sample_id, previous=None):
    """NumPy, float32, each operation rounded on its own."""
    out = np.empty_like(x)
    for i in range(len(x)):
        a, b, c, d = COEF[row[i]]
        t = a * x[i]
        t = t + b * score[i]
        if c != 0:
            z = noise.fill(x[i : i + 1].shape, seed[i : i + 1], sample_id[i : i + 1], int(DRAW[row[i]]) & 0xFFFFFFFF)[0]
            t = t + c * z
        if d != 0 and previous is not None:
            t = t + d * previous[i]
        out[i] = t
    return out


@pytest.mark.parametrize("score_dtype", DTYPES)
@pytest.mark.parametrize("layouts", [("nchw",) * 3, ("nhwc",) * 3, ("nchw", "nhwc", "nchw"), ("nhwc", "nchw", "nhwc")])
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (4, 1, 6, 6), (4, 3, 3, 5), (4, 4, 4, 2), (2, 3, 32, 48)])
def test_update_is_the_definition(device, shape, layouts, score_dtype):
    generator = torch.Generator().manual_seed(0)
    x, score, previous = tensors(shape, layouts, DTYPES[score_dtype], device, generator)
    state = {k: v.to(device) for k, v in slots(shape[0]).items()}
    stop = torch.full((shape[0],), 4, device=device)
    stop[1] = state["row"][1]  # idle
    bad_row = torch.full((shape[0],), NO_BAD_ROW, device=device)
    row = state["row"].clone()
    want = definition(
        x.cpu().numpy(), score.float().cpu().numpy(), *(state[k].cpu().numpy() for k in state), previous.cpu().numpy()
    )
    want[1] = x[1].cpu().numpy()
    cuda.langevin_update(
        Update(x, score, *plan(device), row, stop, state["seed"], state["sample_id"], bad_row, previous, x, True)
    )
    assert (bits(x) == want.view(np.uint32)).all()
    live = torch.ones(shape[0], dtype=torch.int64, device=device)
    live[1] = 0
    assert torch.equal(row, state["row"] + live)
    assert (bad_row == NO_BAD_ROW).all()


@pytest.mark.parametrize("layouts", [("nchw",) * 3, ("nhwc",) * 3, ("nhwc", "nchw", "nhwc")])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 3, 3, 5), (4, 4, 4, 2)])
def test_history_and_gain_equal_cpp(device, shape, layouts):
    """tests/kernels/test_update.py holds the C++ to the definition."""
    from sgm_engine.kernels import cpu

    keep, gain = torch.tensor([[1, 0.3], [0, 0], [0, 1], [-0.7, 2]]), torch.tensor([0.5, 1, 2, 3])
    found = []
    for update, where in ((cuda.langevin_update, device), (cpu.langevin_update, "cpu")):
        x, score, previous = tensors(shape, layouts, torch.bfloat16, where, torch.Generator().manual_seed(5))
        state = {k: v.to(where) for k, v in slots(4).items()}
        stop = torch.tensor([4, 4, 2, 4], device=where)  # slot 2 is idle
        before = previous.clone()
        slot = (state["row"], stop, state["seed"], state["sample_id"], None)
        update(Update(x, score, *plan(where), *slot, previous, x, True, keep.to(where), gain.to(where)))
        assert [torch.equal(a, b) for a, b in zip(previous, before, strict=True)] == [0, 1, 1, 0]
        found.append((bits(x), bits(previous)))
    assert (found[0][0] == found[1][0]).all() and (found[0][1] == found[1][1]).all()


@pytest.mark.parametrize("layouts", [("nchw",) * 3, ("nhwc",) * 3, ("nhwc", "nchw", "nhwc")])
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 3, 3, 5), (5, 4, 4, 2), (5, 1, 32, 48)])
def test_known_pixels_equal_cpp(device, shape, layouts):
    """Here and there, the first half, all, none; with noise of their own, and none after the last row."""
    from sgm_engine.kernels import cpu

    where = torch.rand(shape, generator=torch.Generator().manual_seed(6)) > 0.5
    where[1].view(-1)[:] = torch.arange(where[1].numel()) < where[1].numel() / 2
    where[2], where[3] = True, False
    sigma, draw = torch.tensor([0.7, 0.1, 2, 0]), torch.tensor([2, -1, 7, 0], dtype=torch.int32)
    found = []
    for update, on in ((cuda.langevin_update, device), (cpu.langevin_update, "cpu")):
        x, score, previous = tensors(shape, layouts, torch.bfloat16, on, torch.Generator().manual_seed(5))
        known = torch.randn(shape, generator=torch.Generator().manual_seed(7)).where(where, float("nan")).to(on)
        known[4][where[4]] = -0.0  # no noise there: not even the sign changes
        known = known.contiguous(memory_format=LAYOUTS[layouts[0]])
        state = {k: v.to(on) for k, v in slots(5).items()} | {"row": torch.tensor([0, 1, 2, 0, 3], device=on)}
        score[2], score[3, 0, 0, 0] = float("nan"), float("inf")  # of a known slot, and not: bad
        bad_row = torch.full((5,), NO_BAD_ROW, device=on)
        slot = (state["row"], torch.full((5,), 4, device=on), state["seed"], state["sample_id"], bad_row)
        keep, gain = torch.tensor([[1, 0.3], [0, 0], [0, 0], [-0.7, 2]]), torch.tensor([0.5, 1, 2, 3, 4])
        inpaint = (known, sigma.to(on), draw.to(on))
        update(Update(x, score, *plan(on), *slot, previous, x, True, keep.to(on), gain.to(on), *inpaint))
        assert bad_row.tolist() == [NO_BAD_ROW] * 3 + [0, NO_BAD_ROW]
        assert (bits(x[4])[where[4].numpy()] == bits(known[4])[where[4].numpy()]).all()
        found.append((bits(x), bits(previous)))
    assert all((a == b).all() for a, b in zip(*found, strict=True))


@each_layout
def test_update_out_of_place_changes_nothing_else(device, layout):
    x, score, _ = tensors((3, 3, 8, 8), (layout,) * 3, torch.bfloat16, device, torch.Generator().manual_seed(1))
    state = {k: v.to(device) for k, v in slots(3).items()}
    before = x.clone(), {k: v.clone() for k, v in state.items()}
    out = poisoned(x.shape, layout, device=device)
    cuda.langevin_update(
        Update(x, score, *plan(device), state["row"], None, state["seed"], state["sample_id"], None, None, out, False)
    )
    want = definition(x.cpu().numpy(), score.float().cpu().numpy(), *(state[k].cpu().numpy() for k in state))
    assert (bits(out) == want.view(np.uint32)).all()
    assert torch.equal(x, before[0]) and all(torch.equal(state[k], before[1][k]) for k in state)


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 3, 5, 5)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_update_records_the_first_bad_row(device, shape, value):
    x, score, _ = tensors(shape, ("nchw",) * 3, torch.float32, device, torch.Generator().manual_seed(2))
    score[0, 2, -1, -1] = score[2, 0, 0, 0] = score[3, 1, 1, 1] = value
    state = {k: v.to(device) for k, v in slots(4).items()}
    row, stop = torch.tensor([2, 1, 3, 0], device=device), torch.tensor([4, 4, 4, 0], device=device)  # slot 3 is idle
    bad_row = torch.tensor([NO_BAD_ROW, NO_BAD_ROW, 1, NO_BAD_ROW], device=device)
    cuda.langevin_update(
        Update(x, score, *plan(device), row, stop, state["seed"], state["sample_id"], bad_row, None, x, True)
    )
    assert bad_row.tolist() == [2, NO_BAD_ROW, 1, NO_BAD_ROW]
    assert row.tolist() == [3, 2, 4, 0]


def test_update_runs_a_plan_to_its_end_and_stops(device):
    """Blocks of one slot share its row: it advances once a call, however many they are, and nothing needs a reset."""
    x, score, _ = tensors((2, 3, 32, 48), ("nchw",) * 3, torch.float32, device, torch.Generator().manual_seed(3))
    state = {k: v.to(device) for k, v in slots(2).items()}
    row, stop = torch.tensor([0, 2], device=device), torch.tensor([4, 4], device=device)
    seen = []
    for _ in range(6):
        cuda.langevin_update(
            Update(x, score, *plan(device), row, stop, state["seed"], state["sample_id"], None, None, x, True)
        )
        seen.append(row.tolist())
    assert seen == [[1, 3], [2, 4], [3, 4], [4, 4], [4, 4], [4, 4]]
