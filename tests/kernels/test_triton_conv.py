"""The Triton convolution: on a GPU if there is one, else under Triton's interpreter; its table and who asks it."""

from dataclasses import replace

import pytest
import torch

from sgm_engine.kernels import reference
from sgm_engine.kernels.arguments import Norm
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton.conv import ConvTile
from tests.interpreter import COMPILED, DEVICE, run_interpreted
from tests.kernels.triton_convolutions import (
    NHWC,
    SMALL,
    assert_as_accurate,
    float32,  # noqa: F401 - fixtures
    tensors,
)

# The interpreter's product of bfloat16 matrices is wrong, so float16 stands for it there.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if COMPILED else [])


def run(x, weight, bias, residual, dilation, statistics=False, tile=SMALL):
    out = torch.full((len(x), len(weight), *x.shape[2:]), float("nan"), device=DEVICE, dtype=x.dtype).to(
        memory_format=NHWC
    )
    partial = None
    if statistics:
        partial = torch.full((len(x), x.shape[2] * x.shape[3] // tile.pixels, 2, len(weight)), float("nan"))
        partial = partial.to(DEVICE)
    assert triton_conv.refusal(x, weight, tile, statistics) is None
    triton_conv.convolution(x, weight, bias, residual, dilation, out, partial, tile)
    return (out, partial) if statistics else out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, c_out, kernel, dilation",
    [((1, 32, 7, 5), 32, 3, 1), ((2, 16, 6, 6), 16, 3, 2), ((3, 16, 4, 4), 32, 3, 4), ((1, 32, 7, 5), 48, 1, 1)],
)
def test_convolution(shape, c_out, kernel, dilation, dtype):
    """Taps outside the image, a last tile that is not full, tiles of several images, several tiles of channels."""
    x, weight, bias, residual = tensors(shape, c_out, kernel, dtype)
    for extra in ((None, None), (bias.to(dtype), residual)):
        assert_as_accurate(run(x, weight, *extra, dilation), x, weight, *extra, dilation)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="this GPU has no TMA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, c_out, kernel, dilation",
    [((1, 32, 8, 8), 16, 3, 1), ((2, 16, 4, 16), 32, 3, 2), ((3, 16, 4, 4), 16, 3, 4), ((2, 32, 2, 32), 48, 1, 1)],
)
def test_convolution_with_tma(shape, c_out, kernel, dilation, dtype):
    """Rows of an image, boxes that begin and end outside, two images a tile and one missing, tiles of channels."""
    tile = replace(SMALL, tma=True)
    x, weight, bias, residual = tensors(shape, c_out, kernel, dtype)
    for extra in ((None, None), (bias.to(dtype), residual)):
        assert_as_accurate(run(x, weight, *extra, dilation, tile=tile), x, weight, *extra, dilation)


@pytest.mark.parametrize("tma", [False, True], ids=["loads", "tma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_the_result_feed_the_norm(dtype, tma):
    """Of y as it is stored, merged as `stats` of the norm's own: apply finds the partials where it expects them."""
    if tma and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    x, weight, bias, residual = tensors((2, 16, 8, 8), 32, 3, dtype)
    y, partial = run(x, weight, bias + 30, residual, 1, statistics=True, tile=replace(SMALL, tma=tma))
    assert_as_accurate(y, x, weight, bias + 30, residual, 1)
    for activation, groups, pool in (("elu", None, False), ("silu", 4, False), ("none", None, True)):
        found, given = torch.empty_like(y), partial.clone()
        parameters = (None, None, None, None, activation, None, 1e-5)
        triton_norm.norm(Norm(y, *parameters, found, None, given, groups, pool=pool, slab=SMALL.pixels))
        rest = {"activation": activation, "groups": groups, "pool": pool}
        want, plain = (reference.noise_conditioned_norm(y.to(t), **rest) for t in (torch.float64, torch.float32))
        error, allowed = ((t.double() - want).abs().max().item() for t in (found, plain.to(dtype)))
        assert error <= 2 * allowed + 1e-6


def test_an_empty_batch():
    x, weight, *_ = tensors((1, 16, 4, 4), 16, 3, torch.float32)
    for tile in (SMALL, replace(SMALL, tma=True)):
        assert run(x[:0], weight, None, None, 1, tile=tile).shape == (0, 16, 4, 4)


def test_what_it_cannot_do():
    x, weight, *_ = tensors((1, 16, 6, 6), 16, 3, torch.float32)
    refusal = triton_conv.refusal
    assert refusal(x, weight, SMALL) is None
    assert "neither 1×1 nor 3×3" in refusal(x, weight.repeat(1, 1, 2, 2), SMALL)
    assert "do not divide by 128 and 128" in refusal(x, weight, ConvTile(depth=128))
    assert "channels_last" in refusal(x.contiguous(), weight, SMALL)
    assert "x is torch.float16" in refusal(x.half(), weight, SMALL)
    assert "6×6 pixels do not divide by 32" in refusal(x, weight, SMALL, statistics=True)
    tma = replace(SMALL, tma=True)
    assert "32 pixels are no whole rows or images of 6×6" in refusal(x, weight, tma)
    assert "no whole rows" in refusal(x.new_zeros(1, 16, 1, 64).contiguous(memory_format=NHWC), weight, tma)
    store = x.new_zeros(16 * 64 + 1)[1:].view(1, 8, 8, 16).permute(0, 3, 1, 2)
    assert refusal(store.clone(memory_format=NHWC), weight, tma) is None
    assert "begin at a multiple of 16 bytes" in refusal(store, weight, tma)
    y = torch.zeros(1, 16, 6, 6).to(x).contiguous(memory_format=NHWC)
    assert refusal(x, weight, SMALL, residual=y) is None
    assert "residual is torch.float16" in refusal(x, weight, SMALL, residual=y.half())
    assert "[1, 8, 6, 6], the result is not" in refusal(x, weight, SMALL, residual=y[:, :8])
    assert "residual must be channels_last" in refusal(x, weight, SMALL, residual=y.contiguous())


run_interpreted(globals())
