"""Tests that __main__.py names itself: tiles that are tuned over, which the other tests are too small for, and faults
planted in whole kernels."""

import re

import pytest
import torch

from sgm_engine.kernels.arguments import Norm, NormBackward
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton import norm_backward as triton_norm_backward
from sgm_engine.kernels.triton.launch import Launch
from tests.kernels.triton_convolutions import assert_as_accurate, tensors
from tests.ptx.launches import Simulator
from tests.ptx.plugin import SIMULATOR, TARGET
from tests.ptx.program import Fault, parse

TILES = triton_conv.TILES if TARGET == "sm_80" else triton_conv.TILES + triton_conv.LARGE_TILES


def words(tile: triton_conv.ConvTile) -> str:
    return f"{tile.pixels}x{tile.channels}x{tile.depth}{' tma' if tile.tma else ''}"


@pytest.mark.parametrize("tile", TILES, ids=words)
def test_tiles_that_are_tuned_over(tile):
    """A 3×3 convolution of two chunks of channels, with all that can follow it; on sm_90 by wgmma."""
    shape, c_out = (1, 2 * tile.depth, 16, 16), tile.channels
    x, weight, bias, residual = tensors(shape, c_out, 3, torch.bfloat16)
    out = torch.full_like(residual, float("nan"))
    partial = torch.full((1, 256 // tile.pixels, 2, c_out), float("nan"))
    assert triton_conv.refusal(x, weight, tile, True, residual) is None
    launch = triton_conv.describe(x, weight, bias.bfloat16(), residual, 2, out, partial, tile)
    launch()
    assert_as_accurate(out, x, weight, bias.bfloat16(), residual, 2)
    parts = out.double().permute(0, 2, 3, 1).reshape(1, -1, tile.pixels, c_out)
    mean, deviation = parts.mean(2), parts.var(2, unbiased=False) * tile.pixels
    torch.testing.assert_close(partial[:, :, 0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(partial[:, :, 1].double(), deviation, rtol=1e-5, atol=1e-6)
    (text,) = [c.asm["ptx"] for (name, *_), (c, _) in SIMULATOR.compiled.items() if name == "conv_kernel"][-1:]
    assert ("wgmma" in text) == (TARGET == "sm_90") and ("bulk.tensor" in text) == tile.tma


# Planted in whole kernels ---------------------------------------------------------------------------------------------


def planted(launch: Launch, change) -> Simulator:
    """A simulator that runs what ``change`` makes of the launch's PTX."""
    simulator = Simulator(TARGET)
    key, (compiled, _) = simulator.compile(launch)
    simulator.compiled[key] = compiled, parse(change(compiled.asm["ptx"]))
    return simulator


def stats_launch() -> Launch:
    x = torch.randn(1, 32, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    workspace = torch.full((triton_norm.norm_workspace_size(x),), float("nan"))
    return triton_norm.describe(Norm(x, None, None, None, None, "elu", None, 1e-5, x.clone(), None, workspace))[0]


def test_every_barrier_of_a_kernel_is_missed():
    launch = stats_launch()
    _, (compiled, _) = Simulator(TARGET).compile(launch)
    barriers = [m.span() for m in re.finditer(r"bar\.sync\s+0;", compiled.asm["ptx"])]
    assert len(barriers) > 1
    planted(launch, lambda ptx: ptx)(launch)
    for first, end in barriers:
        with pytest.raises(Fault, match=r"race|before it is written"):
            planted(launch, lambda ptx, first=first, end=end: ptx[:first] + ptx[end:])(launch)


def one_element_groups():
    """(dx, launch): the gradient of a group of one element is 0 whatever its value."""
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 3, 1, 1, generator=draw) for _ in range(2))
    gamma, beta = (torch.randn(3, generator=draw) for _ in range(2))
    dx, part, other = torch.full_like(x, float("nan")), torch.empty(2, 3), torch.empty(2, 3)
    (launch,) = triton_norm_backward.describe(NormBackward(x, grad, gamma, beta, "silu", 1e-5, 3, dx, part, other))
    return dx, launch


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_of_one_element(fused):
    """0, which products fused with sums are not: the launch has to say so."""
    dx, launch = one_element_groups()
    if fused:
        launch = Launch(
            launch.kernel,
            launch.programs,
            launch.arguments,
            launch.constants,
            {**launch.options, "enable_fp_fusion": True},
        )
    launch()
    assert (dx == 0).all() == (not fused)
