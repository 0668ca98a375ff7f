"""The Triton update: on CUDA tensors if there is a GPU, else under Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton

from sgm_engine.kernels import cpu, noise
from sgm_engine.kernels.arguments import Update
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton import update as triton_update
from tests.interpreter import DEVICE, run_interpreted
from tests.kernels.triton_kernels import NCHW, NHWC, SAMPLE_ID, SEED, bits, needs_gpu, on_device, poisoned

NO_BAD_ROW = 2**63 - 1


COEF = np.array(
    [[1, 0.02, 0.2, 0], [0.99, 0.5, 0, 0], [1.01, 0.1, 0.3, 0.7], [1, 0.25, 0, -0.4], [-1, -0.1, 1e-3, 0]], np.float32
)


DRAW = np.array([1, 2**32 - 1, 3, 4, 2**31], np.uint32)


def update_arguments(shape, dtype=torch.float32, layouts=(NCHW,) * 4, previous=True, seed=0):
    """Slots at rows 0 … 4 of COEF, the last one idle; the tensors of langevin_update by name."""
    random = torch.Generator().manual_seed(seed)
    x, score, before = (torch.randn(5, *shape, generator=random).to(DEVICE) for _ in range(3))
    return {
        "x": x.to(memory_format=layouts[0]),
        "score": (score * 30).to(dtype).to(memory_format=layouts[1]),
        "coef": on_device(COEF, torch.float32),
        "draw": torch.from_numpy(DRAW.view(np.int32)).to(DEVICE),
        "row": on_device([0, 1, 2, 3, 4]),
        "stop": on_device([5, 2, 3, 4, 4]),
        "seed": on_device(SEED),
        "sample_id": on_device(SAMPLE_ID),
        "bad_row": on_device([NO_BAD_ROW] * 5),
        "previous": before.to(memory_format=layouts[2]) if previous else None,
        "out": torch.full((5, *shape), float("nan"), device=DEVICE).to(memory_format=layouts[3]),
        "advance": True,
    }


def expected_update(x, score, previous, rows, **_):
    """The definition in NumPy: float32 [B, C, H, W], every operation rounded on its own."""
    x, score = x.cpu().numpy(), score.float().cpu().numpy()
    out = np.empty_like(x)
    for i, row in enumerate(rows):
        a, b, c, d = COEF[row]
        t = a * x[i]
        t = t + b * score[i]
        if c:
            t = t + c * noise.fill(x[i : i + 1].shape, SEED[i], SAMPLE_ID[i], int(DRAW[row]))[0]
        if d and previous is not None:
            t = t + d * previous[i].cpu().numpy()
        out[i] = t
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("layouts", ["CC", "CL", "LC", "LL"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 28, 28), (3, 16, 32)], ids=str)
def test_update_is_the_definition(shape, layouts, dtype):
    x_layout, score_layout = ({"C": NCHW, "L": NHWC}[letter] for letter in layouts)
    arguments = update_arguments(shape, dtype, (x_layout, score_layout, score_layout, x_layout))
    triton_update.langevin_update(Update(**arguments))
    expected = expected_update(**arguments, rows=range(5))
    assert torch.equal(bits(arguments["out"][:4]), bits(expected[:4]))
    assert arguments["out"][4].isnan().all()  # idle: not written
    assert arguments["row"].tolist() == [1, 2, 3, 4, 4]
    assert arguments["bad_row"].tolist() == [NO_BAD_ROW] * 5


@pytest.mark.parametrize("layouts", ["CCC", "LCL", "LLC"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 16, 16)], ids=str)
def test_history_and_gain_equal_cpp(shape, layouts):
    """tests/kernels/test_update.py holds the C++ to the definition."""
    x, score, previous = ({"C": NCHW, "L": NHWC}[letter] for letter in layouts)
    arguments = update_arguments(shape, torch.bfloat16, (x, score, previous, x))
    keep, gain = np.array([[1, 0.3], [0, 0], [0, 1], [-0.7, 2], [1, 1]]), np.array([0.5, 1, 2, 3, 4])
    arguments |= {"keep": on_device(keep, torch.float32), "gain": on_device(gain, torch.float32)}
    there = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    there = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in there.items()}
    before = there["previous"].clone()
    triton_update.langevin_update(Update(**arguments))
    cpu.langevin_update(Update(**there))
    for name in ("out", "previous"):
        assert torch.equal(bits(arguments[name][:4]), bits(there[name][:4])), name
    assert [torch.equal(a, b) for a, b in zip(there["previous"], before, strict=True)] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("plain", [True, False], ids=["", "history, gain"])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 28, 28), (3, 32, 32)], ids=str)
def test_known_pixels_equal_cpp(shape, layout, plain):
    """Here and there, the first half, all, none; rows with and without noise of their own and of known pixels."""
    arguments = update_arguments(shape, torch.bfloat16, (layout, NHWC, NCHW, layout), previous=not plain)
    where = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
    where[1].view(-1)[:] = torch.arange(where[1].numel(), device=DEVICE) < where[1].numel() / 2
    where[2], where[3] = True, False
    known = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    known[4] = -0.0  # no noise there: not even the sign changes
    arguments["known"] = known.where(where, float("nan")).to(memory_format=layout)
    arguments["known_sigma"] = on_device([0.7, 0.1, 2, 1, 0], torch.float32)
    arguments["known_draw"] = torch.tensor([2, -1, 7, 0, 0], dtype=torch.int32, device=DEVICE)
    arguments["row"], arguments["stop"] = on_device([0, 3, 2, 0, 4]), on_device([5] * 5)
    arguments["score"][2], arguments["score"][3, 0, 0, 0] = float("nan"), float("inf")  # of a known slot, and not: bad
    if plain:
        arguments["coef"][:, 3] = 0
    else:
        keep, gain = np.array([[1, 0.3], [0, 0], [0, 1], [-0.7, 2], [1, 1]]), np.array([0.5, 1, 2, 3, 4])
        arguments |= {"keep": on_device(keep, torch.float32), "gain": on_device(gain, torch.float32)}
    there = {k: v.cpu().clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    triton_update.langevin_update(Update(**arguments))
    cpu.langevin_update(Update(**there))
    for name in ("out", "row", "bad_row") + (() if plain else ("previous",)):
        found, expected = arguments[name].cpu(), there[name]
        assert torch.equal(found.nan_to_num(-9), expected.nan_to_num(-9)), name
    assert there["bad_row"].tolist() == [NO_BAD_ROW] * 3 + [0, NO_BAD_ROW]
    assert torch.equal(bits(arguments["out"][4][where[4]]), bits(known[4][where[4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_update_equals_cpp(dtype):
    arguments = update_arguments((3, 16, 16), dtype, (NCHW, NHWC, NCHW, NHWC))
    there = {k: v.cpu().clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    triton_update.langevin_update(Update(**arguments))
    cpu.langevin_update(Update(**there))
    for name in ("out", "row", "bad_row"):
        found, expected = arguments[name].cpu(), there[name]
        assert torch.equal(found.nan_to_num(-9), expected.nan_to_num(-9)), name


def test_update_in_place_of_a_chain():
    arguments = update_arguments((3, 8, 8), previous=False)
    arguments |= {"out": arguments["x"], "row": on_device([0, 0, 1, 4, 5]), "stop": on_device([5] * 5)}
    expected = arguments["x"].clone()
    for step in range(5):
        rows = [min(first + step, 5) for first in (0, 0, 1, 4, 5)]
        live = [i for i in range(5) if rows[i] < 5]
        new = expected_update(expected, arguments["score"], None, [min(row, 4) for row in rows])
        expected[live] = new[live].to(DEVICE)
        triton_update.langevin_update(Update(**arguments))
        assert torch.equal(bits(arguments["x"]), bits(expected)), step
        assert arguments["row"].tolist() == [min(row + 1, 5) for row in rows]


def test_pure_update_changes_nothing_else():
    arguments = update_arguments((2, 5, 5)) | {"stop": None, "bad_row": None, "advance": False}
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v) and k != "out"}
    triton_update.langevin_update(Update(**arguments))
    assert torch.equal(bits(arguments["out"]), bits(expected_update(**arguments, rows=range(5))))
    assert all(torch.equal(arguments[k], v) for k, v in before.items())


@pytest.mark.parametrize("quads", [16, 256])
def test_a_row_advances_once_however_many_programs_share_the_slot(quads):
    arguments = update_arguments((3, 12, 12), previous=False) | {"stop": on_device([5, 5, 5, 0, 4])}
    launch = triton_update.describe(Update(**arguments), config=triton_noise.NoiseConfig(quads=quads))
    assert launch.programs == 5 * triton.cdiv(3 * 12 * 12, 4 * quads)
    for step in range(1, 3):
        launch()
        assert arguments["row"].tolist() == [step, 1 + step, 2 + step, 3, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_the_first_bad_row_is_kept(value, layout):
    arguments = update_arguments((3, 9, 9), layouts=(layout,) * 4) | {"coef": on_device(COEF * 2, torch.float32)}
    arguments["bad_row"][3] = 1  # was bad at row 1 already
    arguments["bad_row"][2] = 4  # cannot happen in order, but the minimum is what is promised
    for slot in (2, 3, 4):
        arguments["x"][slot, 2, 8, 8] = value
    triton_update.langevin_update(Update(**arguments))
    assert arguments["bad_row"].tolist() == [NO_BAD_ROW, NO_BAD_ROW, 2, 1, NO_BAD_ROW]  # slot 4 is idle


def test_update_of_an_empty_batch():
    arguments = update_arguments((3, 4, 4))
    batched = ("x", "score", "previous", "out", "row", "stop", "seed", "sample_id", "bad_row")
    triton_update.langevin_update(Update(**(arguments | {name: arguments[name][:0] for name in batched})))


@needs_gpu
def test_a_captured_update_replays_the_chain():
    arguments = update_arguments((3, 64, 64), torch.bfloat16, previous=False)
    arguments |= {"out": arguments["x"], "row": on_device([0] * 5), "stop": on_device([5] * 5)}
    eager = {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    eager["out"] = eager["x"]
    triton_update.langevin_update(
        Update(**(arguments | {"out": poisoned(arguments["x"]), "advance": False}))
    )  # compiles
    triton_update.langevin_update(Update(**(arguments | {"stop": on_device([0] * 5)})))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_update.langevin_update(Update(**arguments))
    for _ in range(5):
        graph.replay()
        triton_update.langevin_update(Update(**eager))
    assert torch.equal(bits(arguments["x"]), bits(eager["x"]))
    assert arguments["row"].tolist() == eager["row"].tolist() == [5] * 5


run_interpreted(globals())
