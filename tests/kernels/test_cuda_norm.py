"""noise_conditioned_norm in CUDA C++, through the launchers that a GPU uses, there and on the CPU (conftest.py)."""

import itertools
import random

import pytest
import torch

from sgm_engine.kernels import cuda, reference
from sgm_engine.kernels.arguments import Norm
from tests.cuda_host import DTYPES, LAYOUTS, each_layout

GUARD = 4096  # floats after a workspace, which must stay as they are


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
    size = cuda.norm_workspace_size(x)
    workspace = torch.full((size + GUARD,), float("nan"), device=device)
    table = on(embedding)
    views = {
        k: table[:, i * channels : (i + 1) * channels] if levels > 1 else table[0, i * channels : (i + 1) * channels]
        for i, k in enumerate("gab")
    }
    views = [views[k] if k in terms else None for k in "gab"]
    tensors = (on(x), *views, on(level), activation, on(r), 1e-5, out, total, workspace)
    cuda.norm(Norm(*tensors, groups, before, pool), variant)
    assert workspace[size:].isnan().all(), "written past the end of the workspace"

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


# NCSN's shapes; pixels that do not divide among the blocks; last blocks without any; all the channels that fit.
CLUSTER = [
    (2, 128, 32, 32),
    (3, 256, 16, 16),
    (1, 64, 28, 28),
    (1, 32, 3, 7),
    (5, 8, 31, 31),
    (1, 512, 1, 17),
    (1, 1024, 1, 17),
    (1, 512, 7, 7),
    (2, 512, 5, 5),
    (1, 256, 7, 7),
    (1, 1024, 3, 3),
]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", CLUSTER)
def test_norm_in_one_pass(device, shape, residual):
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no thread-block clusters before sm_90")
    check_norm(device, shape, torch.bfloat16, "nhwc", "cluster", residual=residual)
    if shape[1] < 1024:
        check_norm(device, shape, torch.float32, "nhwc", "cluster", residual=residual)


@pytest.mark.parametrize("multiprocessors", [1, 7])
@pytest.mark.parametrize("shape", [(1, 512, 7, 7), (3, 256, 16, 16), (1, 1152, 6, 7)])
def test_norm_in_one_pass_whatever_the_device(host_library, monkeypatch, shape, multiprocessors):
    """(1, 1152, 6, 7) takes eight blocks everywhere, for its registers, and the last one has no pixel."""
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setenv("SGM_HOST_MULTIPROCESSORS", str(multiprocessors))
    check_norm("cpu", shape, torch.bfloat16, "nhwc", "cluster")


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


# -- The workspace -----------------------------------------------------------------------------------------------------


def test_a_workspace_that_wide_packs_fill_more_of(device):
    """Narrow packs make 59 slabs of these pixels, those of 8 channels 62."""
    check_norm(device, (1, 96, 72, 144), torch.bfloat16, "nhwc", "portable")


def test_no_shape_writes_past_its_workspace(host_library, monkeypatch):
    """Of what the library would launch, aligned or not: a block of the first kernel writes 2·C floats."""
    monkeypatch.setenv("SGM_HOST_DRY", "1")
    draw = random.Random(0)
    shapes = [(c, p) for c in range(8, 260, 8) for p in (49, 1024, 10368)]
    shapes += [(draw.randint(1, 1300), draw.randint(1, 2 ** draw.randint(1, 17))) for _ in range(1500)]
    shapes += [(draw.randint(1, 160) * 8, draw.randint(1, 2 ** draw.randint(1, 14)) * 8) for _ in range(1500)]
    for (channels, pixels), (dtype, nhwc, address) in itertools.product(
        shapes, itertools.product((0, 1), (0, 1), (1 << 20, (1 << 20) + 4))
    ):
        reserved = host_library.sgm_cuda_norm_workspace(3, channels, pixels, nhwc)
        sizes = (1e-5, 3, channels, pixels, pixels, 0, 0)
        error = host_library.sgm_cuda_norm(
            address, None, address, None, dtype, nhwc, None, None, None, 0, 0, 0, None, 0, 0, *sizes, 1 << 20, 1, None
        )
        assert error == 0
        written = host_library.sgm_host_blocks() * 2 * channels
        assert written <= reserved, (channels, pixels, dtype, nhwc, address)


# -- Races -------------------------------------------------------------------------------------------------------------


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
