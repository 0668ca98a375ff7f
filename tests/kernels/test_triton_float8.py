"""The float8 kernels in Triton's interpreter, or on a GPU that has float8, against the reference."""

import pytest
import torch

from sgm_engine.kernels import reference
from sgm_engine.kernels.arguments import Norm
from sgm_engine.kernels.tables import conv as conv_table
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import float8 as triton_float8
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton.conv import ConvTile
from sgm_engine.rewriting.float8.conv import Float8Conv
from tests.interpreter import COMPILED, DEVICE, INTERPRETED, convert_float8_exactly, run_interpreted

NHWC, FLOAT8 = torch.channels_last, torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if COMPILED else [])
SMALL = ConvTile(pixels=32, channels=32, depth=32, warps=4)
if INTERPRETED:
    convert_float8_exactly()
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no float8"
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(x):
    return x.cpu().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantise(dtype):
    """Every float8, the ties between two of them, values beyond the largest, infinities, and a NaN that stays one."""
    e4m3 = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()  # 127 is NaN
    ties = (e4m3[1:] + e4m3[:-1]) / 2
    x = torch.cat([e4m3, ties, ties * 1.01, torch.tensor([449.0, 463, 465, 1e4, 60000, torch.inf, torch.nan])])
    x = torch.cat([x, -x, draw(8192) * 100]).to(dtype) / 2
    out = torch.zeros(len(x), dtype=torch.uint8).view(FLOAT8).to(DEVICE)
    triton_float8.quantise(x.to(DEVICE), 2.0, out)
    want = reference.quantised(x, 2.0)
    assert torch.equal(bits(out)[~x.isnan()], bits(want)[~x.isnan()])
    assert out.cpu().float()[x.isnan()].isnan().all() and x.isnan().sum() == 2
    assert want.float()[~x.isnan()].abs().max() == 448


def problem(shape, c_out, kernel):
    n, c_in, height, width = shape
    x, residual = draw(*shape, seed=1) * 50, draw(n, c_out, height, width, seed=2)
    weight = draw(c_out, c_in, kernel, kernel, seed=3) * 50
    x, weight = (t.to(FLOAT8).contiguous(memory_format=NHWC).to(DEVICE) for t in (x, weight))
    scale = (draw(c_out, seed=4).abs() + 0.1) / 2500 / (c_in * kernel * kernel) ** 0.5
    residual = residual.contiguous(memory_format=NHWC)
    return x, weight, *(t.to(DEVICE) for t in (scale, draw(c_out, seed=5), residual))


def assert_as_accurate(found, want, formula):
    """The 2× rule."""
    error, allowed = ((t.double() - want).abs().max().item() for t in (found, formula))
    assert error <= 2 * allowed + 2 * torch.finfo(torch.float32).eps * want.abs().max().item(), (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, c_out, kernel, dilation",
    [((1, 64, 7, 5), 32, 3, 1), ((2, 32, 6, 6), 64, 3, 2), ((1, 32, 7, 5), 32, 1, 1)],
)
def test_float8_convolution(shape, c_out, kernel, dilation, dtype):
    """Taps outside the image, a last tile that is not full, several tiles of channels, several chunks."""
    x, weight, scale, bias, residual = problem(shape, c_out, kernel)
    assert triton_conv.refusal(x, weight, SMALL) is None
    for extra in ((None, None), (bias, residual.to(dtype))):
        out = torch.full_like(residual, float("nan"), dtype=dtype)
        triton_conv.convolution(x, weight, *extra, dilation, out, None, SMALL, scale)
        arguments = (x, weight, scale, 1.0, *extra, dilation)
        exact, formula = (reference.float8_convolution(*arguments, t) for t in (torch.float64, torch.float32))
        assert_as_accurate(out, exact, formula.to(dtype))


def test_a_nan_in_float8_reaches_the_result():
    x, weight, scale, *_ = problem((1, 32, 6, 6), 32, 3)
    x.view(torch.uint8)[0, 3, 2, 2] = 0x7F
    out = torch.zeros_like(x, dtype=torch.float32)
    triton_conv.convolution(x, weight, None, None, 1, out, None, SMALL, scale)
    assert out[0, :, 1:4, 1:4].isnan().all() and out.isnan().sum() == 9 * 32


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_norm_that_writes_float8(dtype):
    """What it would else write, rounded, bit by bit; the sum beside it is as ever."""
    x, other = (draw(2, 16, 6, 6, seed=s).to(DEVICE, dtype).contiguous(memory_format=NHWC) for s in (1, 2))
    workspace = torch.empty(triton_norm.norm_workspace_size(x), device=DEVICE)
    beta = draw(16, seed=3).to(DEVICE)
    written = []
    for inverse in (None, 200.0):
        out = torch.empty_like(x, dtype=dtype if inverse is None else FLOAT8)
        total = torch.full_like(x, float("nan"))
        rest = {} if inverse is None else {"inverse": inverse}
        triton_norm.norm(Norm(x, None, beta, beta, None, "elu", other, 1e-5, out, total, workspace, **rest))
        written.append((out, total))
    (plain, total), (rounded, total8) = written
    assert torch.equal(bits(rounded), bits(reference.quantised(plain, 200.0))) and torch.equal(total, total8)
    assert (rounded.float().abs() == 448).any() and rounded.float().unique().numel() > 50


@torch.no_grad()
def test_a_layer_on_the_kernels_is_the_emulated_one():
    """From NCHW, of any dtype, or quantised before; the interpreter cuts the digits of a bfloat16 off."""
    conv = torch.nn.Conv2d(64, 32, 3, padding=2, dilation=2)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    emulated, layer = (Float8Conv(conv, 40.0, emulate).to(DEVICE) for emulate in (True, False))
    for each in (emulated, layer):
        each.load(conv.to(DEVICE))
    x = draw(2, 64, 7, 5).to(DEVICE)
    want = emulated(x).float()
    for given in (x, reference.quantised(x, 40.0).contiguous(memory_format=NHWC)):
        found = layer(given)
        assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=NHWC)
        assert ((found.float() - want).abs() <= want.abs() / 64 + 1e-3).all()


@torch.no_grad()
def test_a_layer_leaves_the_partials_of_the_norm_after_it(monkeypatch):
    """The sum of the emulated layer and the residual, and its moments tile by tile; only where the table says so."""
    conv = torch.nn.Conv2d(32, 32, 3, padding=1)
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    emulated, layer = (Float8Conv(conv, 40.0, emulate).to(DEVICE) for emulate in (True, False))
    for each in (emulated, layer):
        each.load(conv.to(DEVICE))
    x, residual = (draw(2, 32, 8, 8, seed=s).to(DEVICE).contiguous(memory_format=NHWC) for s in (1, 2))
    residual = 16 * residual.bfloat16()
    assert layer.tuned(x, layer.bias, residual, "sum and norm") is None
    monkeypatch.setattr(conv_table, "choose", lambda x, w, d, then="": SMALL if then == "sum and norm" else None)
    assert layer.tuned(x, layer.bias, None, "norm") is None
    assert emulated.tuned(x, emulated.bias, residual, "sum and norm") is None
    assert layer.tuned(x, layer.bias, residual.float(), "sum and norm") is None
    y, partials = layer.tuned(x, layer.bias, residual, "sum and norm")
    want = emulated(x).float() + residual.float()
    assert ((y.float() - want).abs() <= want.abs() / 64 + 1e-3 * want.abs().max()).all()
    tiles = y.permute(0, 2, 3, 1).reshape(2, 2, 32, 32).double()  # sample, tile, pixel, channel
    moments = torch.stack([tiles.mean(2), (tiles - tiles.mean(2, keepdim=True)).square().sum(2)], 2)
    torch.testing.assert_close(partials.double(), moments, rtol=1e-5, atol=1e-4)


run_interpreted(globals())
