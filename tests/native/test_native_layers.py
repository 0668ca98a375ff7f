"""Layers of later networks against float64: attention, borders, groups, filters, norms by pixel."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine import _C
from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Table, Unsupported
from tests.native.layers import relative_error, run_layers
from tests.native.test_native import LEVELS

TOLERANCE = 2e-6


def row(t):
    return Table(lambda: t, len(t), (t,))


def heads_of(x, heads):
    """[B, 3·heads·d, H, W] → q, k, v [B, heads, H·W, d]."""
    return [part.unflatten(1, (heads, -1)).flatten(3).mT for part in x.chunk(3, 1)]


def image_of(y, x):
    """[B, heads, H·W, d] → [B, heads·d, H, W]."""
    return y.mT.flatten(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize(
    "heads, size, pixels", [(1, 8, (1, 1)), (2, 5, (3, 7)), (4, 32, (8, 8)), (3, 64, (12, 5)), (2, 24, (25, 29))]
)
def test_attention(isa, heads, size, pixels):
    """One key to more than a tile; sizes that fill no vector; with keys of no pixel; scores far apart."""
    torch.manual_seed(0)
    x = torch.randn(2, 3 * heads * size, *pixels)
    x[0] *= 4
    q, k, v = heads_of(x.double(), heads)
    for scale, memory in ((None, None), (0.7 / math.sqrt(size), torch.randn(2, heads, 3, size))):
        parts = k, v
        if memory is not None:
            parts = [torch.cat([m.double().expand(2, -1, -1, -1), p], 2) for m, p in zip(memory, parts, strict=True)]
        want = image_of(F.scaled_dot_product_attention(q, *parts, scale=scale), x)
        eager = [p.float() for p in parts]
        eager = image_of(F.scaled_dot_product_attention(q.float(), *eager, scale=scale), x)
        table = None if memory is None else row(memory)
        y = run_layers(lambda g, value, s=scale, t=table: g.attention(value, heads * size, heads, s, t), x)
        assert relative_error(y, want) < 2 * relative_error(eager, want) + 3e-7


@pytest.mark.parametrize("heads, size, pixels", [(1, 3, (1, 2)), (4, 32, (9, 6)), (2, 20, (28, 28))])
def test_linear_attention(isa, heads, size, pixels):
    torch.manual_seed(0)
    x, memory = torch.randn(2, 3 * heads * size, *pixels), torch.randn(2, heads, 4, size)
    q, k, v = heads_of(x.double(), heads)
    k, v = (torch.cat([m.double().expand(2, -1, -1, -1), p], 2) for m, p in zip(memory, (k, v), strict=True))
    want = image_of(q.softmax(3) * 0.25 @ (k.softmax(2).mT @ v), x)
    y = run_layers(lambda g, value: g.linear_attention(value, heads * size, heads, 0.25, row(memory)), x)
    assert relative_error(y, want) < TOLERANCE


def test_attention_of_another_order_of_rows():
    """What EDM's, ADM's and diffusers' q, k and v lie like in the 1×1's outputs is a matter of packing."""
    torch.manual_seed(0)
    heads, size, x = 2, 6, torch.randn(2, 12, 4, 5)
    qkv = nn.Conv2d(12, 36, 1)
    order = torch.arange(36).view(heads, size, 3).permute(2, 0, 1).flatten().tolist()  # outputs [heads][size][q, k, v]
    with torch.no_grad():
        y = copy.deepcopy(qkv).double()(x.double()).unflatten(1, (heads, size, 3)).flatten(4)
        q, k, v = y.permute(3, 0, 1, 4, 2)
    want = image_of(F.scaled_dot_product_attention(q, k, v), x)
    kernel = Kernel.of(qkv)
    found = run_layers(lambda g, v: g.attention(g.conv(v, kernel.rearranged(order)), 12, heads), x)
    assert relative_error(found, want) < TOLERANCE
    parts = [kernel.rearranged(order[i * 12 : (i + 1) * 12]) for i in range(3)]
    found = run_layers(lambda g, v: g.attention(g.conv(v, Kernel.stacked(parts)), 12, heads), x)
    assert relative_error(found, want) < TOLERANCE


CONVS = [
    nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(8, 12, 5, stride=2, padding=2, padding_mode="replicate"),
    nn.Conv2d(8, 12, 3, padding=(2, 0)),
    nn.Conv2d(8, 12, 4, padding="same"),
    nn.Conv2d(8, 12, 3, padding="valid"),
    nn.Conv2d(8, 12, 3, padding=3),
    nn.Conv2d(8, 12, 3, padding=1, groups=4),
    nn.Conv2d(8, 8, 3, padding=1, groups=8),
    nn.Conv2d(8, 16, 3, padding=1, groups=8, stride=2),
    nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode="circular"),
    nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1),
    nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(8, 12, 2, stride=2, bias=False),
    nn.ConvTranspose2d(8, 12, 3, stride=3, groups=4, dilation=2),
    nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=8),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_convolutions(isa, conv):
    """Behind a prologue, with an addend times a number, and read by a norm: the statistics are those of the output."""
    torch.manual_seed(0)
    x, norm = torch.randn(2, 8, 9, 7), nn.GroupNorm(2, conv.out_channels)
    with torch.no_grad():
        y = copy.deepcopy(conv).double()(F.gelu(x.double()))
        want = F.group_norm(0.75 * y + y, 2, eps=1e-5)

    def emit(graph, value):
        first = graph.conv(value, conv, None, "gelu")
        return graph.activate(graph.conv(value, conv, None, "gelu", add=[(first, 0.75)]), "none", norm)

    assert relative_error(run_layers(emit, x), want) < TOLERANCE


def test_padding_of_one_side():
    """diffusers' downsampling: a row and a column of zeros behind, then 3×3 of stride 2."""
    torch.manual_seed(0)
    x, conv = torch.randn(2, 5, 8, 6), nn.Conv2d(5, 7, 3, stride=2)
    want = copy.deepcopy(conv).double()(F.pad(x.double(), (0, 1, 0, 1))).detach()
    w, b = conv.weight, conv.bias
    kernel = Kernel(5, 7, 3, lambda: w, lambda: b, (w, b), stride=2, padding=(0, 1, 0, 1))
    assert relative_error(run_layers(lambda g, v: g.conv(v, kernel), x), want) < TOLERANCE


@pytest.mark.parametrize("taps", [[1.0, 3, 3, 1], [1.0, 1], [1.0, 2, 1]])
@pytest.mark.parametrize("up, down", [(2, 1), (1, 2), (1, 1)])
def test_filters(isa, taps, up, down):
    """upfirdn2d as StyleGAN defines it: zeros behind every pixel, the last too."""
    torch.manual_seed(0)
    x, f = torch.randn(2, 19, 6, 8), torch.tensor(taps) / sum(taps) * up
    padding = (len(taps) // 2 + up - 1, len(taps) // 2, 1, 2)
    z = x.double()
    if up == 2:
        z = torch.zeros(2, 19, 12, 16, dtype=torch.float64)
        z[:, :, ::2, ::2] = x.double()
    z = F.pad(z, (padding[2], padding[3], padding[0], padding[1]))
    kernel = (f[:, None] * f).double().expand(19, 1, -1, -1)
    want = F.conv2d(z, kernel, stride=down, groups=19)
    y = run_layers(
        lambda g, v: g.fir(v, f.tolist(), up, down, padding, add=[(g.fir(v, f, up, down, padding), -0.5)]), x
    )
    assert relative_error(y, want / 2) < TOLERANCE


def test_a_bias_by_level(isa):
    """A time embedding after a convolution: in its bias, and in the statistics that the next norm takes."""
    torch.manual_seed(0)
    x, level, shift = torch.randn(3, 6, 8, 8), torch.tensor([2, 0, 1]), torch.randn(LEVELS, 20)
    for conv in (nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(6, 20, 1, bias=False)):
        kernel, norm = Kernel.of(conv).scaled(0.5).shifted(row(shift)), nn.GroupNorm(5, 20)
        with torch.no_grad():
            want = copy.deepcopy(conv).double()(x.double()) * 0.5 + shift[level, :, None, None]
        for precision in ("direct", "winograd"):
            y = run_layers(lambda g, v, k=kernel, n=norm: g.activate(g.conv(v, k), "none", n), x, level, precision)
            assert relative_error(y, F.group_norm(want, 5)) < TOLERANCE
    graph = Graph(3, "float32")
    graph.store(graph.load(6, 8, 8), kernel)
    graph.plan()
    assert relative_error(graph.run(x, level, torch.full((3, 20, 8, 8), torch.nan)), want) < TOLERANCE
    with pytest.raises(IndexError, match="level"):
        graph.run(x, level + 1, torch.empty(3, 20, 8, 8))


@pytest.mark.parametrize("images", [1, 7, 13])
@pytest.mark.parametrize("out, groups", [(12, 1), (32, 1), (64, 1), (80, 1), (256, 2)])
def test_images_of_one_pixel(isa, images, out, groups):
    """A linear layer, with a bias of each image's own level and an addend; an image alone has the same bits."""
    torch.manual_seed(0)
    x, level, shift = torch.randn(images, 40, 1, 1), torch.arange(images) % LEVELS, torch.randn(LEVELS, out)
    conv, skip = nn.Conv2d(40, out, 1, groups=groups), nn.Conv2d(40, out, 1)
    kernel = Kernel.of(conv).shifted(row(shift))
    with torch.no_grad():
        y, added = (copy.deepcopy(c).double()(F.silu(x.double())) for c in (conv, skip))
        want = y + shift[level, :, None, None] + 0.5 * added

    def emit(graph, value):
        return graph.conv(value, kernel, None, "silu", add=[(graph.conv(value, skip, None, "silu"), 0.5)])

    found = run_layers(emit, x, level)
    assert relative_error(found, want) < TOLERANCE
    assert torch.equal(run_layers(emit, x[-1:], level[-1:]), found[-1:])


@pytest.mark.parametrize("name, function", [
    ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("tanh", torch.tanh),
    ("sigmoid", torch.sigmoid), (("leaky_relu", 0.2), lambda x: F.leaky_relu(x, 0.2)),
    (("clip", 1.5), lambda x: x.clamp(-1.5, 1.5)), ("silu", F.silu), ("elu", F.elu),
])  # fmt: skip
def test_activations(isa, name, function):
    """From tiny to huge, against the same function of float32 in PyTorch; NaN stays NaN."""
    magnitudes = torch.logspace(-6, 2, 200)
    x = torch.cat([magnitudes, -magnitudes, torch.linspace(-9, 9, 624)]).view(1, 16, 8, 8)
    y, want = run_layers(lambda g, v: g.activate(v, name), x).double(), function(x.double())
    eager = (function(x).double() - want).abs()
    assert ((y - want).abs() <= 2 * eager + 4e-7 * want.abs() + 2e-7).all()
    x[0, 3, 2, 1] = torch.nan
    assert run_layers(lambda g, v: g.activate(v, name), x)[0, 3, 2, 1].isnan()


@pytest.mark.parametrize("channels, groups", [(5, 1), (32, 1), (36, 6), (64, 2)])
def test_norms_across_channels(isa, channels, groups):
    """LayerNorm, lucidrains' RMSNorm, and EDM2's; of q, k and v by head. A pixel of zeros stays zeros."""
    torch.manual_seed(0)
    x, level, gain = torch.randn(2, channels, 5, 6) + 20, torch.tensor([1, 2]), torch.randn(LEVELS, channels)
    x[0, :, 2, 3] = 0
    g64 = gain[level, :, None, None].double()
    parts = x.double().unflatten(1, (groups, -1))
    centred = parts - parts.mean(2, keepdim=True)
    cases = {
        "layer": ({"eps": 1e-5}, centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()),
        "rms": ({"centred": False, "floor": 1e-24}, F.normalize(parts, dim=2) * (channels // groups) ** 0.5),
        "edm2": (
            {"centred": False, "after": 1e-2},
            parts / (1e-2 + parts.norm(dim=2, keepdim=True) / (channels // groups) ** 0.5),
        ),
    }
    for name, (arguments, want) in cases.items():
        want = F.silu(want.flatten(1, 2) * g64) + x.double()
        y = run_layers(
            lambda g, v, a=arguments: g.channel_norm(v, groups, **a, scale=row(gain), activation="silu", add=[v]),
            x,
            level,
        )
        assert relative_error(y, want) < TOLERANCE, name


def emit_all(graph, value):
    """A value of 24 channels by every layer here."""
    h = graph.conv(value, nn.Conv2d(24, 72, 1))
    h = graph.attention(h, 24, 3)
    h = graph.conv(
        h, nn.Conv2d(24, 24, 3, padding=1, groups=4, padding_mode="reflect"), None, "gelu", add=[(value, 0.5)]
    )
    h = graph.linear_attention(graph.conv(h, nn.Conv2d(24, 48, 1)), 16, 2)
    h = graph.channel_norm(h, eps=1e-5)
    return graph.conv(
        graph.fir(h, [0.25, 0.75, 0.75, 0.25], 2, 1, (2, 1, 2, 1)), nn.Conv2d(16, 24, 3, stride=2, padding=1)
    )


@pytest.mark.parametrize("precision", ["float32", "winograd"])
def test_bits_on_any_number_of_threads(isa, threads, precision):
    """Few images and many threads: members of a team share an image."""
    torch.manual_seed(0)
    x, found = torch.randn(2, 24, 11, 9), []
    for count in (1, 2, 3, 7):
        threads(count)
        torch.manual_seed(1)
        found.append(
            run_layers(lambda g, v: g.activate(emit_all(g, v), "silu", nn.GroupNorm(4, 24)), x, precision=precision)
        )
    assert all(torch.equal(found[0], y) for y in found) and found[0].isfinite().all()


@pytest.mark.skipif(_C.isa() != "avx512_bf16", reason="no AVX512_BF16")
def test_bfloat16():
    torch.manual_seed(0)
    x = torch.randn(2, 24, 11, 9)
    found = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(1)
        found.append(run_layers(emit_all, x, precision=precision))
    assert relative_error(found[1], found[0].double()) < 3e-2


def test_what_has_no_layer():
    x = torch.randn(1, 6, 4, 4)
    for emit, message in (
        (lambda g, v: g.attention(v, 3, 1), "1 heads of 3 channels from 6"),
        (lambda g, v: g.attention(v, 2, 3), "3 heads of 2"),
        (lambda g, v: g.fir(v, [1.0] * 8), "up to 7×7"),
        (lambda g, v: g.fir(v, [1.0, 1], 2, 2), "up and down at once"),
        (lambda g, v: g.conv(v, nn.ConvTranspose2d(6, 6, 3, 2, padding=4)), "padding beyond"),
        (lambda g, v: g.conv(v, Kernel.of(nn.Conv2d(6, 6, 1)).rearranged([6])), "outputs 6 to 6 of 6"),
        (
            lambda g, v: g.conv(v, nn.Conv2d(6, 6, 3, padding=4, padding_mode="reflect")),
            "repeats more than its input holds",
        ),
        (lambda g, v: g.activate(v, ("clip", -1.0)), "limit of clip"),
        (lambda g, v: g.channel_norm(v, 4), "divide into groups"),
        (lambda g, v: g.linear_attention(v, 2, 1, math.inf), "finite scale"),
    ):
        with pytest.raises(ValueError, match=message):
            run_layers(emit, x)
    with pytest.raises(Unsupported, match="differ in more"):
        Kernel.stacked([Kernel.of(nn.Conv2d(6, 6, k)) for k in (1, 3)])
