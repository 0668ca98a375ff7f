"""The CUDA C++ kernels, through the launchers that a GPU uses.

Every test runs twice: on a GPU, where there is one, and from the same sources on the CPU (cuda_on_host.h), where
barriers, arrivals, clusters and masks are as on the device, and so is every bit of the noise and of the update.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm_engine.kernels import cuda, noise, reference
from sgm_engine.kernels.arguments import Norm, Update
from sgm_engine.kernels.ops import NO_BAD_ROW
from sgm_engine.kernels.tables import backend as backend_table

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """The library built for the CPU."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DSGM_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}"]
    jobs = []
    for source in SOURCES:
        header = ["-include", str(ROOT / "tests" / "cuda_on_host.h"), "-x", "c++", str(source)]
        jobs.append(subprocess.Popen([compiler, *flags, "-c", *header, "-o", str(folder / f"{source.stem}.o")]))
    assert all(job.wait() == 0 for job in jobs)
    objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
    library = folder / "libsgm_cuda.so"
    subprocess.run([compiler, "-shared", "-Wl,-z,defs", *objects, "-o", str(library)], check=True)
    return cuda.library(library)


@pytest.fixture(params=["host", "gpu"])
def device(request, monkeypatch):
    """Where the tensors go; cuda.library() is then the library that takes them."""
    if request.param == "host":
        library = request.getfixturevalue("host_library")
        monkeypatch.setattr(cuda, "library", lambda: library)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if cuda.library() is None:
        pytest.fail("libsgm_cuda.so is not built: SGM_WITH_CUDA=1 python setup.py build_ext --inplace")
    return "cuda"


def poisoned(shape, layout, dtype=torch.float32, device="cpu"):
    return torch.full(shape, float("nan"), dtype=dtype, device=device).to(memory_format=LAYOUTS[layout])


def bits(t):
    return t.detach().cpu().contiguous().numpy().view(np.uint32)


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


# -- The norm ----------------------------------------------------------------------------------------------------------


def check_norm(
    device, shape, dtype, layout, variant, activation="elu", residual=True, terms="gab", levels=3, mean=3.0,
    groups=None, before="none", pool=False,
):  # fmt: skip
    """Against float64: at most twice the error of PyTorch's float32 formula, then one rounding to the dtype."""
    generator = torch.Generator().manual_seed(4)
    batch, channels = shape[:2]
    layout = LAYOUTS[layout]
    x = (torch.randn(shape, generator=generator) * 2 + mean).to(dtype).contiguous(memory_format=layout)
    r = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) if residual else None
    embedding = torch.randn(levels, 3 * channels, generator=generator)
    parameters = {k: embedding[:, i * channels : (i + 1) * channels] for i, k in enumerate("gab")}
    level = torch.randint(levels, (batch,), generator=generator)
    if levels == 1:
        parameters, level = {k: p[0] for k, p in parameters.items()}, None
    gamma, alpha, beta = (parameters[k] if k in terms else None for k in "gab")

    on = lambda t: None if t is None else t.to(device)  # noqa: E731
    out, total = torch.full_like(x, float("nan"), device=device), None
    if residual or before != "none":
        total = torch.full_like(out, float("nan"))
    workspace = torch.full((cuda.norm_workspace_size(x),), float("nan"), device=device)
    table = on(embedding)
    views = {
        k: table[:, i * channels : (i + 1) * channels] if levels > 1 else table[0, i * channels : (i + 1) * channels]
        for i, k in enumerate("gab")
    }
    views = [views[k] if k in terms else None for k in "gab"]
    tensors = (on(x), *views, on(level), activation, on(r), 1e-5, out, total, workspace)
    cuda.norm(Norm(*tensors, groups, before, pool), variant)

    summed = x + r if residual else x
    if before != "none":
        exact = reference.ACTIVATIONS[before](summed.double())
        error = (total.cpu().double() - exact).abs()
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 2**-22).all(), f"{error.max():.3g}"
        summed = total.cpu()
    elif residual:
        assert torch.equal(total.cpu(), summed)
    f64 = [None if p is None else p.double() for p in (gamma, alpha, beta)]
    rest = {"groups": groups, "pool": pool}
    want = reference.noise_conditioned_norm(summed.double(), *f64, level, activation, **rest)
    eager = reference.noise_conditioned_norm(summed.float(), gamma, alpha, beta, level, activation, **rest)
    allowed = 2 * (eager.double() - want).abs().max() + 0.505 * torch.finfo(dtype).eps * want.abs() + 1e-5
    error = (out.cpu().double() - want).abs()
    assert (error <= allowed).all(), f"{error.max():.3g}"
    return out


SHAPES = [
    (2, 16, 8, 8),
    (3, 24, 5, 7),
    (1, 64, 28, 28),
    (2, 131, 3, 3),
    (1, 128, 16, 16),
    (1, 2, 100, 96),
    (1, 8, 1, 1),
]


@pytest.mark.parametrize("variant", ["auto", "portable"])
@each_layout
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(device, shape, dtype, layout, variant):
    check_norm(device, shape, DTYPES[dtype], layout, variant)


# NCSN's shapes; pixels that do not divide among the blocks; a last block without any; all the channels that fit.
CLUSTER = [
    (2, 128, 32, 32),
    (3, 256, 16, 16),
    (1, 64, 28, 28),
    (1, 32, 3, 7),
    (5, 8, 31, 31),
    (1, 512, 1, 17),
    (1, 1024, 1, 17),
]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", CLUSTER)
def test_norm_in_one_pass(device, shape, residual):
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no thread-block clusters before sm_90")
    check_norm(device, shape, torch.bfloat16, "nhwc", "cluster", residual=residual)
    if shape[1] < 1024:
        check_norm(device, shape, torch.float32, "nhwc", "cluster", residual=residual)


@pytest.mark.parametrize("activation", ["none", "elu", "relu", "silu"])
@pytest.mark.parametrize("terms", ["", "g", "gb", "a", "gab"])
def test_norm_terms_are_optional(device, activation, terms):
    for levels in (1, 4):
        check_norm(device, (2, 8, 4, 4), torch.float32, "nhwc", "auto", activation, False, terms, levels)
        check_norm(device, (2, 6, 4, 4), torch.float32, "nchw", "auto", activation, False, terms, levels)


@pytest.mark.parametrize(
    "shape, groups", [((2, 32, 16, 16), 8), ((1, 64, 9, 7), 1), ((2, 24, 5, 5), 24), ((1, 256, 4, 4), 32)]
)
@pytest.mark.parametrize("variant, layout", [("cluster", "nhwc"), ("portable", "nhwc"), ("portable", "nchw")])
def test_norm_of_groups(device, variant, layout, shape, groups):
    """As GroupNorm has it, with and without a sum; a mean that differs from channel to channel is in `terms` of x."""
    if variant == "cluster" and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no thread-block clusters before sm_90")
    for dtype in (torch.float32, torch.bfloat16):
        for residual in (False, True):
            check_norm(device, shape, dtype, layout, variant, "silu", residual, "gb", groups=groups)


@pytest.mark.parametrize("before", ["none", "elu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@each_layout
def test_chained_pooling(device, layout, residual, before):
    """before(x + residual) → (5×5 mean of its norm, itself): edges, slabs that end in a row, odd widths."""
    for shape in ((2, 16, 7, 5), (1, 64, 28, 28), (2, 131, 3, 3), (1, 8, 1, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            check_norm(device, shape, dtype, layout, "auto", "none", residual, before=before, pool=True)
    check_norm(
        device, (2, 24, 6, 9), torch.float32, layout, "auto", "none", residual, "gb", groups=4, before=before, pool=True
    )


@pytest.mark.parametrize("variant", ["cluster", "portable"])
@pytest.mark.parametrize("residual", [False, True])
def test_activation_before_a_norm(device, residual, variant):
    if variant == "cluster" and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no thread-block clusters before sm_90")
    for dtype in (torch.float32, torch.bfloat16):
        check_norm(device, (2, 32, 16, 16), dtype, "nhwc", variant, "elu", residual, before="elu")


def test_a_large_mean_in_a_pool(device):
    check_norm(device, (1, 16, 28, 28), torch.float32, "nhwc", "auto", "none", False, "g", mean=3000.0, pool=True)


@pytest.mark.parametrize("variant", ["cluster", "portable"])
def test_norm_of_a_large_mean(device, variant):
    check_norm(device, (1, 16, 32, 32), torch.float32, "nhwc", variant, mean=3000.0, residual=False, terms="g")


@pytest.mark.parametrize("variant", ["cluster", "portable"])
def test_norm_in_place(device, variant):
    x = (
        torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(5))
        .to(device)
        .contiguous(memory_format=torch.channels_last)
    )
    apart = torch.full_like(x, float("nan"))
    workspace = torch.empty(cuda.norm_workspace_size(x), device=device)
    for out in (apart, x):
        cuda.norm(Norm(x, None, None, None, None, "relu", None, 1e-5, out, None, workspace), variant=variant)
    assert torch.equal(apart, x)


def test_norm_propagates_nan(device):
    for activation in ("none", "elu", "relu", "silu"):
        x = torch.ones(2, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
        x[1, 3, 2, 2] = float("nan")
        out = torch.zeros_like(x)
        workspace = torch.empty(cuda.norm_workspace_size(x), device=device)
        cuda.norm(Norm(x, None, None, None, None, activation, None, 1e-5, out, None, workspace))
        assert out[1, 3].isnan().all() and not out[0].isnan().any() and not out[1, :3].isnan().any()


def test_what_the_library_refuses(device):
    x = torch.zeros(1, 12, 4, 4, dtype=torch.bfloat16, device=device).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"sgm_cuda_norm: CUDA error .* not supported"):
        workspace = torch.empty(1000, device=device)
        cuda.norm(Norm(x, None, None, None, None, "none", None, 1e-5, x, None, workspace), variant="cluster")
    wide = torch.zeros(1, 13000, 1, 1, device=device)
    workspace = torch.empty(cuda.norm_workspace_size(wide), device=device)
    with pytest.raises(RuntimeError, match="invalid argument"):
        cuda.norm(Norm(wide, None, None, None, None, "none", None, 1e-5, wide, None, workspace))


# -- Races: on the host, the other order of blocks and threads; on a GPU, repetition -----------------------------------


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("variant", ["cluster", "portable", "pool"])
def test_norm_does_not_depend_on_the_order_of_threads(host_library, monkeypatch, variant, groups):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    pool = variant == "pool"
    options = {"terms": "gb" if groups else "gab", "groups": groups, "before": "elu", "pool": pool}
    how = ("auto", "none") if pool else (variant, "elu")
    runs = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("SGM_HOST_ORDER", order)
        runs.append(check_norm("cpu", (2, 32, 16, 16), torch.bfloat16, "nhwc", *how, **options))
    assert torch.equal(*runs)


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
