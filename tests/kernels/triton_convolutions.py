"""What the tests of triton conv share."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from sgm_engine.kernels.triton.conv import ConvTile
from sgm_engine.numerics import float32_math
from tests.interpreter import DEVICE

NHWC = torch.channels_last


SMALL = ConvTile(pixels=32, channels=16, depth=16, warps=4)


@pytest.fixture(autouse=True)
def float32():
    """PyTorch's own convolutions too, which on a GPU are TensorFloat-32 unless told otherwise."""
    with float32_math("ieee") if DEVICE == "cuda" else nullcontext():
        yield


def tensors(shape, c_out, kernel, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=random)  # noqa: E731
    n, c_in, height, width = shape
    x, residual = draw(*shape), draw(n, c_out, height, width)
    weight = draw(c_out, c_in, kernel, kernel) / (c_in * kernel * kernel) ** 0.5
    x, weight, residual = (t.to(DEVICE, dtype).contiguous(memory_format=NHWC) for t in (x, weight, residual))
    return x, weight, draw(c_out).to(DEVICE), residual


def definition(x, weight, bias, residual, dilation):
    padding = weight.shape[-1] // 2 * dilation
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding=padding, dilation=dilation)
    return y if residual is None else y + residual


def assert_as_accurate(found, x, weight, bias, residual, dilation):
    """The 2× rule: PyTorch's formula in float32, rounded once, is the measure."""
    wide = lambda kind: [None if t is None else t.to(kind) for t in (x, weight, bias, residual)]  # noqa: E731
    exact = definition(*wide(torch.float64), dilation)
    formula = definition(*wide(torch.float32), dilation).to(found.dtype)
    error, allowed = ((t.double() - exact).abs().max().item() for t in (found, formula))
    assert error <= 2 * allowed + 2 * torch.finfo(torch.float32).eps * exact.abs().max().item(), (error, allowed)
