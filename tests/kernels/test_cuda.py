"""The CUDA C++ kernels of noise and update, through the launchers that a GPU uses.

Every test runs twice (conftest.py): on a GPU, where there is one, and from the same sources on the CPU
(cuda_on_host.h), where barriers, arrivals, clusters and masks are as on the device, and so is every bit of the noise
and of the update.
"""

import numpy as np
import pytest
import torch

from sgm_engine.kernels import cuda, noise, reference
from sgm_engine.kernels.arguments import Norm, Update
from sgm_engine.kernels.ops import NO_BAD_ROW
from sgm_engine.kernels.tables import backend as backend_table
from tests.cuda_host import DTYPES, LAYOUTS, bits, each_layout, poisoned

# -- The noise ---------------------------------------------------------------------------------------------------------


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


# -- The update --------------------------------------------------------------------------------------------------------

COEF = np.array([[1, 0.25, 0.5, 0], [0.75, -0.1, 0, 0.3], [1.5, 2, 0.1, -0.7], [1, 0.1, 0, 0]], np.float32)
DRAW = np.array([1, 7, -1, 9], np.int32)  # the bits of a uint32


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


def tensors(shape, layouts, score_dtype, device, generator):
    draw = lambda dtype, layout: (  # noqa: E731
        torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    )
    return draw(torch.float32, layouts[0]), draw(score_dtype, layouts[1]), draw(torch.float32, layouts[2])


def plan(device):
    return torch.from_numpy(COEF).to(device), torch.from_numpy(DRAW).to(device)


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


# -- Races: on the host, the other order of blocks and threads; on a GPU, repetition -----------------------------------


def test_update_does_not_depend_on_the_order_of_threads(host_library, monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setenv("SGM_HOST_ORDER", "reverse")
    test_update_runs_a_plan_to_its_end_and_stops("cpu")
    test_update_is_the_definition("cpu", (2, 3, 32, 48), ("nchw",) * 3, "bf16")


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
def test_backends_agree_bit_for_bit_on_a_gpu():
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import update as triton_update

    seed, sample_id = torch.arange(8, device="cuda") - 4, torch.arange(8, device="cuda") * 2**33
    a, b = poisoned((8, 3, 32, 32), "nhwc", device="cuda"), poisoned((8, 3, 32, 32), "nhwc", device="cuda")
    cuda.noise_fill(a, seed, sample_id, 3, 0, "normal")
    triton_noise.noise_fill(b, seed, sample_id, 3, 0, "normal")
    assert (bits(a) == bits(b)).all()
    score = torch.randn(8, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(8, device="cuda") % 4, torch.full((8,), 4, device="cuda")
    for update, x in ((cuda.langevin_update, a), (triton_update.langevin_update, b)):
        slots_of = (rows[0].clone(), rows[1], seed, sample_id, None)
        update(Update(x, score, *plan("cuda"), *slots_of, score.float(), x, True))
    assert (bits(a) == bits(b)).all()


@gpu
def test_a_captured_chain_repeats_250_times_on_a_gpu():
    """Replays of one captured step walk a whole plan; every chain ends in the same bits and at the plan's last row."""
    shape, steps = (16, 3, 32, 32), 20
    coef = torch.tensor([[1, 0.1, 0.2, 0]] * steps, device="cuda")
    draw, seed = torch.arange(1, steps + 1, device="cuda", dtype=torch.int32), torch.arange(16, device="cuda")
    row, stop = torch.zeros(16, dtype=torch.int64, device="cuda"), torch.full((16,), steps, device="cuda")
    bad_row, x = torch.full((16,), NO_BAD_ROW, device="cuda"), torch.zeros(shape, device="cuda")
    score = torch.empty_like(x)

    def step():
        torch.neg(x, out=score)
        cuda.langevin_update(Update(x, score, coef, draw, row, stop, seed, seed, bad_row, None, x, True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first = None
    for _ in range(250):
        x.zero_(), row.zero_()
        for _ in range(steps):
            graph.replay()
        assert (row == steps).all()
        first = x.clone() if first is None else first
        assert torch.equal(x, first)


# -- The library -------------------------------------------------------------------------------------------------------


def test_a_missing_library_is_an_answer(tmp_path):
    assert cuda.library(tmp_path / "libsgm_cuda.so") is None


def test_an_empty_batch_is_nothing_to_do(device):
    empty, none = torch.empty(0, 3, 4, 4, device=device), torch.empty(0, dtype=torch.int64, device=device)
    cuda.noise_fill(empty, none, none, 0, 0, "normal")
    cuda.langevin_update(Update(empty, empty, *plan(device), none, none, none, none, none, None, empty, True))
    cuda.norm(Norm(empty, None, None, None, None, "none", None, 1e-5, empty, None, empty))


# -- The choice of it --------------------------------------------------------------------------------------------------


def test_the_table_of_backends_leads_here(device, monkeypatch):
    """Nothing but the table decides (test_backends.py), and what the library is given then is what it takes."""
    from sgm_engine.kernels import gpu as launchers
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import norm as triton_norm

    table = {"norm residual float32 NHWC 8×4×4 at 2^1": "CUDA portable", "noise_fill normal NCHW 2^6": "CUDA"}
    monkeypatch.setattr(backend_table, "of_device", lambda _: table)
    for module in (triton_norm, triton_noise):
        monkeypatch.setattr(module, "norm" if module is triton_norm else "noise_fill", lambda *_: pytest.fail("Triton"))
    x, residual, total = (poisoned((2, 8, 4, 4), "nhwc", device=device) for _ in range(3))
    x.normal_()
    out, residual = torch.empty_like(x), torch.ones_like(x)
    workspace = torch.empty(launchers.norm_workspace_size(x), device=device)
    launchers.norm(Norm(x, None, None, None, None, "elu", residual, 1e-5, out, total, workspace))
    want, both = reference.noise_conditioned_norm(x, activation="elu", residual=residual)
    torch.testing.assert_close(out, want)
    assert torch.equal(total, both)
    fill, seed = poisoned((2, 3, 4, 4), "nchw", device=device), torch.tensor([3, 4])
    launchers.noise_fill(fill, seed.to(device), seed.to(device), 1, 0, "normal")
    assert (bits(fill) == noise.fill((2, 3, 4, 4), seed.numpy(), seed.numpy(), 1, 0, "normal").view(np.uint32)).all()
