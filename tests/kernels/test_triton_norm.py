"""The Triton norm: on CUDA tensors if there is a GPU, else under Triton's interpreter."""

import pytest
import torch

from sgm_engine.kernels import reference
from sgm_engine.kernels.arguments import Norm
from sgm_engine.kernels.triton import norm as triton_norm
from tests.interpreter import COMPILED, DEVICE, run_interpreted
from tests.kernels.triton_kernels import NCHW, NHWC, bits, needs_gpu, poisoned

# The interpreter truncates where a GPU rounds float32 to bfloat16; there, bfloat16 is only read.
NORM_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if COMPILED else [])


def norm_inputs(shape, dtype, layout, offset=1.0, seed=0):
    """x, residual; γ, α, β as views [L, C] of one embedding [L, 3C]; level."""
    random = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=random) * 2 + offset for _ in range(2))
    gamma, alpha, beta = torch.randn(10, 3 * shape[1], generator=random).to(DEVICE).chunk(3, 1)
    level = torch.randint(0, 10, shape[:1], generator=random).to(DEVICE)
    x, residual = (t.to(DEVICE, dtype).to(memory_format=layout) for t in (x, residual))
    return x, residual, gamma, alpha, beta, level


def run_norm(
    x, gamma=None, alpha=None, beta=None, level=None, activation="none", residual=None, eps=1e-5, out=None, groups=None,
    before="none", pool=False, bias=None, residual_bias=None,
):  # fmt: skip
    out = poisoned(x) if out is None else out
    total = None if residual is None and before == "none" else poisoned(x)
    workspace = torch.full((triton_norm.norm_workspace_size(x),), float("nan"), device=DEVICE)
    tensors = (x, gamma, alpha, beta, level, activation, residual, eps, out, total, workspace)
    triton_norm.norm(Norm(*tensors, groups, before, pool, None, None, bias, residual_bias))
    return out if total is None else (out, total)


# What is allowed beside the formula's error. A GPU's division, exponential and 1/√ are off by up to two ulps each
# (PTX ISA: div.full, ex2.approx, rsqrt.approx), where the interpreter's are rounded.
ULPS = 4 if COMPILED else 2


def assert_as_accurate(found, x, *arguments, **options):
    """Error against float64 ≤ 2 × that of the float32 formula, rounded to the same dtype, + ULPS (float32) of max."""
    expected = reference.noise_conditioned_norm(x.double(), *arguments, **options)
    formula = reference.noise_conditioned_norm(x.float(), *arguments, **options).to(found.dtype)
    error, allowed = ((t.double() - expected).abs().max().item() for t in (found, formula))
    atol = ULPS * torch.finfo(torch.float32).eps * expected.abs().max().item()
    assert error <= 2 * allowed + atol, f"error {error:.3g}, of the formula {allowed:.3g}"


NORM_SHAPES = [(1, 128, 32, 32), (1, 256, 16, 16), (1, 64, 28, 28), (3, 32, 14, 14), (2, 5, 7, 3), (1, 2, 1, 1)]


NORM_SHAPES += [(1, 3, 160, 160), (1, 1024, 12, 12)]  # several tiles a slab; the most partials


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm(shape, layout, dtype):
    x, _, *parameters = norm_inputs(shape, dtype, layout)
    assert_as_accurate(run_norm(x, *parameters, "elu"), x, *parameters, "elu")


@pytest.mark.parametrize("shape", [(1, 384, 11, 67), (1, 131, 34, 66)], ids=str)
def test_a_last_slab_of_fewer_tiles(shape):
    """Its last tile begins where it ends, and after it."""
    x, _, *parameters = norm_inputs(shape, torch.float32, NHWC)
    tiling = triton_norm.Tiling.of(shape[1], shape[2] * shape[3], True)
    tiles = -(-tiling.slab // tiling.pixels)
    assert shape[2] * shape[3] - (tiling.slabs - 1) * tiling.slab <= (tiles - 1) * tiling.pixels
    assert_as_accurate(run_norm(x, *parameters, "elu"), x, *parameters, "elu")


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", NORM_SHAPES[2:5], ids=str)
def test_norm_of_a_sum(shape, layout, dtype):
    x, residual, *parameters = norm_inputs(shape, dtype, layout)
    found, total = run_norm(x, *parameters, "elu", residual)
    assert torch.equal(total, x + residual)
    assert total.stride() == found.stride() == x.stride()
    assert_as_accurate(found, total, *parameters, "elu")


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "shape, groups",
    [((2, 128, 16, 16), 32), ((2, 12, 7, 5), 1), ((2, 12, 7, 5), 4), ((2, 12, 7, 5), 12), ((1, 6, 96, 96), 2)],
    ids=str,
)
def test_norm_of_groups(shape, groups, layout):
    """Groups of 4, 12, 3, 1 channels, and of 3 in several slabs."""
    for dtype in NORM_DTYPES:
        x, residual, gamma, _, beta, level = norm_inputs(shape, dtype, layout)
        x += torch.arange(shape[1], device=DEVICE, dtype=dtype)[:, None, None] % 5  # the channels' means differ
        arguments = (gamma, None, beta, level, "silu")
        assert_as_accurate(run_norm(x, *arguments, groups=groups), x, *arguments, groups=groups)
        found, total = run_norm(x, *arguments, residual, groups=groups)
        assert torch.equal(total, x + residual)
        assert_as_accurate(found, total, *arguments, groups=groups)
        assert_as_accurate(run_norm(x, groups=groups, eps=1e-2), x, groups=groups, eps=1e-2)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("before, summed", [("none", False), ("none", True), ("elu", False), ("silu", True)])
def test_chained_pooling(before, summed, groups, layout):
    """before(x + residual) → (5×5 mean of its norm, itself): edges, several tiles, a tile that ends in a row."""
    for shape, dtype in (
        ((2, 12, 7, 5), NORM_DTYPES[-1]),
        ((1, 64, 12, 14), NORM_DTYPES[0]),
        ((1, 4, 3, 2), NORM_DTYPES[1]),
    ):
        x, residual, gamma, alpha, beta, level = norm_inputs(shape, dtype, layout)
        arguments = (gamma, alpha if groups is None else None, beta, level)
        residual = residual if summed else None
        found = run_norm(x, *arguments, residual=residual, groups=groups, before=before, pool=True)
        s = x if residual is None else x + residual
        if before != "none" or summed:
            found, total = found
            exact = reference.ACTIVATIONS[before](s.double())
            spacing = torch.finfo(dtype).eps + (ULPS - 2) * torch.finfo(torch.float32).eps
            assert (total.double() - exact).abs().max() <= spacing * exact.abs().max()
            s = total
        assert_as_accurate(found, s, *arguments, groups=groups, pool=True)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_activation_before_a_norm(layout):
    x, residual, *arguments = norm_inputs((2, 32, 9, 9), torch.float32, layout)
    for extra in (None, residual):
        found, total = run_norm(x, *arguments, "elu", residual=extra, before="elu")
        torch.testing.assert_close(total, reference.ACTIVATIONS["elu"](x if extra is None else x + extra))
        assert_as_accurate(found, total, *arguments, "elu")


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("before, pool", [("none", False), ("none", True), ("elu", True)])
@pytest.mark.parametrize("groups", [None, 4])
def test_biases(groups, before, pool, summed, layout):
    """Of x alone, which is read as it is; of a sum, with one vector and with two."""
    x, residual, gamma, alpha, beta, level = norm_inputs((2, 12, 7, 5), torch.float32, layout)
    arguments, options = (gamma, None if groups else alpha, beta, level), {"groups": groups, "pool": pool}
    b, rb = (3 * torch.randn(12, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in (1, 2))
    pairs = ((b, None), (None, rb), (b, rb)) if summed else ((b, None),)
    for bias, residual_bias in pairs:
        pair = {"bias": bias, "residual_bias": residual_bias}
        found = run_norm(x, *arguments, residual=residual if summed else None, before=before, **options, **pair)
        if summed or before != "none":
            found, total = found
            exact = reference.summed(x.double(), residual if summed else None, bias, residual_bias)
            torch.testing.assert_close(total.double(), reference.ACTIVATIONS[before](exact), rtol=1e-6, atol=3e-6)
            assert_as_accurate(found, total, *arguments, **options)
        else:
            assert_as_accurate(found, x, *arguments, **options, bias=bias)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_a_large_mean_in_a_pool(layout):
    x, _, gamma, _, beta, level = norm_inputs((1, 64, 28, 28), torch.float32, layout, 1e3)
    assert_as_accurate(run_norm(x, gamma, None, beta, level, pool=True), x, gamma, None, beta, level, pool=True)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_large_means_in_groups(layout):
    x, _, gamma, _, beta, level = norm_inputs((2, 64, 28, 28), torch.float32, layout, 1e3)
    assert_as_accurate(run_norm(x, gamma, None, beta, level, groups=8), x, gamma, None, beta, level, groups=8)


@pytest.mark.parametrize("activation", ["none", "elu", "relu", "silu"])
@pytest.mark.parametrize("terms", ["", "g", "b", "a", "gb", "ab", "gab"])
def test_norm_options(terms, activation):
    x, _, *parameters, level = norm_inputs((3, 12, 6, 6), torch.float32, NHWC)
    parameters = [p if name in terms else None for name, p in zip("gab", parameters, strict=True)]
    rows = [None if p is None else p[4].contiguous() for p in parameters]  # [C]: one row for all levels
    for arguments in ((*parameters, level if terms else None), (*rows, None)):
        assert_as_accurate(run_norm(x, *arguments, activation), x, *arguments, activation)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_norm_of_bfloat16_reads_it_right(layout):
    x, _, *arguments = norm_inputs((2, 16, 8, 8), torch.bfloat16, layout)
    assert_as_accurate(run_norm(x, *arguments, out=poisoned(x.float())), x, *arguments)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("offset", [1e3, -1e5])
def test_a_large_mean_costs_no_more_than_in_the_formula(offset, layout):
    x, _, gamma, _, beta, level = norm_inputs((2, 64, 28, 28), torch.float32, layout, offset)
    assert_as_accurate(run_norm(x, gamma, None, beta, level), x, gamma, None, beta, level)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_constant_channels_give_beta(layout):
    x, _, gamma, _, beta, level = norm_inputs((2, 8, 9, 9), torch.float32, layout)
    x[:] = 3.7
    found = run_norm(x, gamma, None, beta, level)
    assert torch.equal(found, beta[level][:, :, None, None].expand_as(x))


def test_norm_in_place_and_of_each_sample_alone():
    x, residual, *arguments = norm_inputs((4, 64, 12, 12), torch.float32, NHWC)
    together, _ = run_norm(x, *arguments, "silu", residual)
    for i in range(4):
        *rows, level = arguments
        alone, _ = run_norm(x[i : i + 1], *rows, level[i : i + 1], "silu", residual[i : i + 1])
        assert torch.equal(bits(alone[0]), bits(together[i]))
    expected = run_norm(x, *arguments, "elu")
    assert torch.equal(bits(run_norm(x, *arguments, "elu", out=x)), bits(expected))


def test_norm_propagates_nan_in_its_sample_only():
    x, _, *arguments = norm_inputs((2, 8, 8, 8), torch.float32, NHWC)
    x[1, 3, 2, 2] = float("nan")
    for activation in ("elu", "relu", "silu"):
        found = run_norm(x, *arguments, activation)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()  # one mean is NaN, and ms spreads it over the channels


def test_norm_of_an_empty_batch():
    run_norm(torch.empty(0, 8, 4, 4, device=DEVICE))


@needs_gpu
def test_250_norms_are_equal():
    x, residual, *arguments = norm_inputs((16, 128, 32, 32), torch.bfloat16, NHWC)
    first, _ = run_norm(x, *arguments, "elu", residual)
    for _ in range(250):
        assert torch.equal(run_norm(x, *arguments, "elu", residual)[0], first)


run_interpreted(globals())
