"""The Triton convolution: on a GPU if there is one, else under Triton's interpreter; its table and who asks it."""

import json

import pytest
import torch
from interpreter import DEVICE, run_interpreted
from torch.nn import functional as F

from sgm_engine.chosen_conv import ChosenConv, chosen
from sgm_engine.kernels import conv_table, reference, triton_conv, triton_norm
from sgm_engine.kernels.triton_conv import ConvTile

NHWC = torch.channels_last
# The interpreter's product of bfloat16 matrices is wrong, so float16 stands for it there.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SMALL = ConvTile(pixels=32, channels=16, depth=16, warps=4)


def tensors(shape, c_out, kernel, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=random)  # noqa: E731
    n, c_in, height, width = shape
    x, residual = draw(*shape), draw(n, c_out, height, width)
    weight = draw(c_out, c_in, kernel, kernel) / (c_in * kernel * kernel) ** 0.5
    x, weight, residual = (t.to(DEVICE, dtype).contiguous(memory_format=NHWC) for t in (x, weight, residual))
    return x, weight, draw(c_out).to(DEVICE), residual


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_the_result_feed_the_norm(dtype):
    """Of y as it is stored, merged as `stats` of the norm's own: apply finds the partials where it expects them."""
    x, weight, bias, residual = tensors((2, 16, 8, 8), 32, 3, dtype)
    y, partial = run(x, weight, bias + 30, residual, 1, statistics=True)
    assert_as_accurate(y, x, weight, bias + 30, residual, 1)
    whole = triton_norm.Tiling.of(32, 64, True)
    _, apply = triton_norm.describe(
        y, None, None, None, None, "elu", None, 1e-5, torch.empty_like(y), None, partial.flatten()
    )
    slabs = {"SLAB": SMALL.pixels, "SLABS": 64 // SMALL.pixels}
    blocks = apply.programs // whole.slabs * slabs["SLABS"]
    triton_norm.Launch(apply.kernel, blocks, apply.arguments, apply.constants | slabs, apply.options)()
    found = apply.arguments["out_ptr"]
    want, plain = (reference.noise_conditioned_norm(y.to(t), activation="elu") for t in (torch.float64, torch.float32))
    error, allowed = ((t.double() - want).abs().max().item() for t in (found, plain.to(dtype)))
    assert error <= 2 * allowed + 1e-6


def test_an_empty_batch():
    x, weight, *_ = tensors((1, 16, 4, 4), 16, 3, torch.float32)
    assert run(x[:0], weight, None, None, 1).shape == (0, 16, 4, 4)


def test_what_it_cannot_do():
    x, weight, *_ = tensors((1, 16, 6, 6), 16, 3, torch.float32)
    refusal = triton_conv.refusal
    assert refusal(x, weight, SMALL) is None
    assert "neither 1×1 nor 3×3" in refusal(x, weight.repeat(1, 1, 2, 2), SMALL)
    assert "do not divide by 128 and 128" in refusal(x, weight, ConvTile(depth=128))
    assert "channels_last" in refusal(x.contiguous(), weight, SMALL)
    assert "x is torch.float16" in refusal(x.half(), weight, SMALL)
    assert "6×6 pixels do not divide by 32" in refusal(x, weight, SMALL, statistics=True)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_of_the_package():
    assert conv_table.read() == {} or all(
        isinstance(t, ConvTile) for d in conv_table.read().values() for t in d.values()
    )


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = {"a GPU": {"shape b": ConvTile(), "shape a": SMALL}}
    conv_table.write(table, tmp_path / "t.json")
    assert conv_table.read(tmp_path / "t.json") == table
    assert list(json.loads((tmp_path / "t.json").read_text())["a GPU"]) == ["shape a", "shape b"]


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"b": {"pixel": 3}}}', '{"a": 3}'])
def test_a_bad_table(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json is not a table of convolutions"):
        conv_table.read(tmp_path / "t.json")


def test_shapes_of_the_table():
    x, weight, *_ = tensors((4, 16, 8, 6), 32, 3, torch.float16)
    assert conv_table.shape_key(x, weight, 2) == "float16 16×8×6 16→32 3×3 d2 at 4"
    assert conv_table.choose(x, weight, 2) is None or DEVICE == "cuda"


@torch.no_grad()
def test_a_tuned_shape_goes_to_the_kernel_and_others_do_not(monkeypatch):
    conv = torch.nn.Conv2d(16, 32, 3, padding=2, dilation=2).to(DEVICE, memory_format=NHWC)
    x = torch.randn(2, 16, 8, 8, device=DEVICE).contiguous(memory_format=NHWC)
    key = conv_table.shape_key(x, conv.weight, 2)
    asked = []

    def choose(x, weight, dilation):
        asked.append(conv_table.shape_key(x, weight, dilation))
        return SMALL if asked[-1] == key else None

    monkeypatch.setattr(conv_table, "choose", choose)
    layer, ran = ChosenConv(conv), []
    convolution = triton_conv.convolution
    monkeypatch.setattr(triton_conv, "convolution", lambda *a: (ran.append(1), convolution(*a)))
    found = layer(x)
    assert ran == [1] and found.is_contiguous(memory_format=NHWC)
    assert_as_accurate(found, x, conv.weight, conv.bias, None, 2)
    torch.testing.assert_close(layer(x[:1]), conv(x[:1]))
    assert ran == [1] and asked == [key, key.replace("at 2", "at 1")]
    with torch.enable_grad():
        layer(x).sum().backward()
    assert ran == [1] and conv.weight.grad is not None


def test_which_convolutions_are_asked_about(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(conv_table, "table", lambda: {"a GPU": {"shape": SMALL}})
    cuda, Conv = torch.device("cuda"), torch.nn.Conv2d
    assert isinstance(chosen(Conv(4, 4, 3, padding=2, dilation=2), cuda), ChosenConv)
    assert isinstance(chosen(Conv(4, 8, 1), cuda), ChosenConv)
    others = [Conv(4, 4, 3), Conv(4, 4, 3, 2, 1), Conv(4, 4, 5, padding=2), Conv(4, 4, 3, padding=1, groups=2)]
    others += [Conv(4, 4, 3, padding=1, padding_mode="reflect"), torch.nn.Linear(4, 4)]
    assert all(chosen(other, cuda) is other for other in others)
    fits = Conv(4, 4, 3, padding=1)
    assert chosen(fits, torch.device("cpu")) is fits
    monkeypatch.setattr(conv_table, "table", dict)
    assert chosen(fits, cuda) is fits  # nothing tuned: cuDNN everywhere


run_interpreted(globals())
