"""The CUDA C++ norm, through the launchers that a GPU uses."""

import functools

import pytest
import torch

from sgm_engine.kernels import cuda
from sgm_engine.kernels.arguments import Norm
from tests.kernels.cuda_kernels import (
    DTYPES,
    check_norm,
    device,  # noqa: F401 - fixtures
    each_layout,
    host_library,  # noqa: F401
)

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


@each_layout
@pytest.mark.parametrize("residual, biases", [(False, "b"), (True, "b"), (True, "r"), (True, "br")])
def test_biases(device, residual, biases, layout):
    """Of x alone, which is read as it is; of a sum, with one vector and with two; vectors of whole packs and not."""
    run = functools.partial(check_norm, device, layout=layout, variant="auto", residual=residual, biases=biases)
    for dtype in (torch.float32, torch.bfloat16):
        run((2, 24, 6, 9), dtype)
        run((2, 24, 6, 9), dtype, terms="gb", groups=4)
        run((2, 24, 6, 9), dtype, before="elu")
        run((2, 24, 6, 9), dtype, activation="none", pool=True)
        run((2, 131, 3, 3), dtype)


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
