"""The Triton convolution: on a GPU if there is one, else under Triton's interpreter; its table and who asks it."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sgm_engine.kernels import norm_op, reference
from sgm_engine.kernels.arguments import Norm
from sgm_engine.kernels.tables import conv as conv_table
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton.conv import ConvTile
from sgm_engine.models.blocks import ConditionalInstanceNormPlus
from sgm_engine.numerics import float32_math
from sgm_engine.rewriting import acceleration
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.chosen_conv import ChosenConv, ConvNorm, chosen
from sgm_engine.rewriting.recognise import recognise
from tests.interpreter import DEVICE, run_interpreted
from tests.plain_networks import Network

NHWC = torch.channels_last
# The interpreter's product of bfloat16 matrices is wrong, so float16 stands for it there.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
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


@pytest.mark.parametrize("tma", [False, True])
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
    assert conv_table.shape_key(x, weight, 2, "norm") == "float16 16×8×6 16→32 3×3 d2 at 4, then norm"
    assert conv_table.choose(x, weight, 2) is None or DEVICE == "cuda"


@torch.no_grad()
def test_a_tuned_shape_goes_to_the_kernel_and_others_do_not(monkeypatch):
    conv = torch.nn.Conv2d(16, 32, 3, padding=2, dilation=2).to(DEVICE, memory_format=NHWC)
    x = torch.randn(2, 16, 8, 8, device=DEVICE).contiguous(memory_format=NHWC)
    key = conv_table.shape_key(x, conv.weight, 2)
    asked = []

    def choose(x, weight, dilation, then=""):
        asked.append(conv_table.shape_key(x, weight, dilation, then))
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


@pytest.fixture
def tuned(monkeypatch):
    """shapes: what the table has, by ``then``; ran: (residual, partials) of every convolution of the kernel's."""
    shapes, ran = set(), []
    monkeypatch.setattr(conv_table, "choose", lambda x, w, d, then="": SMALL if then in shapes else None)
    convolution = triton_conv.convolution

    def noted(x, weight, bias, residual, dilation, out, partial, tile, scale):
        ran.append((residual is not None, partial is not None))
        convolution(x, weight, bias, residual, dilation, out, partial, tile, scale)

    monkeypatch.setattr(triton_conv, "convolution", noted)
    if DEVICE == "cpu":  # partials go to Triton, as on a GPU
        own = norm_op.launchers("cpu")

        def norm(n):
            triton_norm.norm(n) if n.slab else own.norm(n)

        monkeypatch.setattr(norm_op, "launchers", lambda device: own._replace(norm=norm))
    return shapes, ran


@pytest.mark.parametrize("options", [{"activation": "elu"}, {"pool": True}], ids=str)
@torch.no_grad()
def test_a_convolution_with_its_norm(tuned, options):
    shapes, ran = tuned
    x, weight, bias, residual = tensors((2, 16, 8, 8), 32, 3, torch.float32)
    conv = torch.nn.Conv2d(16, 32, 3, padding=2, dilation=2).to(DEVICE)
    conv.weight.copy_(weight), conv.bias.copy_(bias)
    norm = recognise(ConditionalInstanceNormPlus(32, 3).to(DEVICE))
    both, level = ConvNorm(ChosenConv(conv.to(memory_format=NHWC)), norm), torch.tensor([2, 0], device=DEVICE)
    for extra, then in ((None, "norm"), (residual, "sum and norm")):
        shapes.clear(), ran.clear()
        plain, total = both(x, level, residual=extra, **options)
        assert not ran
        shapes.add(then)
        found, total8 = both(x, level, residual=extra, **options)
        assert ran == [(extra is not None, True)]
        assert_as_accurate(total8, x, weight, bias, extra, 2)
        exact, formula = (
            reference.noise_conditioned_norm(
                total8.to(t),
                **dict(zip(norm.roles, norm.embedding.weight.to(t).split(32, 1), strict=True)),
                level=level,
                **options,
            )
            for t in (torch.float64, torch.float32)
        )
        error, allowed = ((y.double() - exact).abs().max().item() for y in (found, formula))
        assert error <= 2 * allowed + 1e-6
        torch.testing.assert_close((plain, total), (found, total8), rtol=1e-4, atol=1e-4)
        ran.clear()
        wanted = [conv.weight, norm.embedding.weight, x, *([] if extra is None else [extra])]
        for tensor in wanted:  # one at a time: the kernels have no gradient for any of them
            [t.requires_grad_(t is tensor) for t in (conv.weight, conv.bias, norm.embedding.weight, *wanted)]
            with torch.enable_grad():
                both(x, level, residual=extra, **options)[0].square().sum().backward()
            assert tensor.grad.abs().max() > 0 and not ran
        [t.requires_grad_(False) for t in wanted]


@pytest.fixture
def traced_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(conv_table, "table", lambda: {"a GPU": {"shape": SMALL}})
    monkeypatch.setattr(acceleration, "chosen", lambda module, device: chosen(module, torch.device("cuda")))
    monkeypatch.setattr(acceleration, "_is_fused_around", lambda x: True)


@torch.no_grad()
def test_networks_join_convolutions_and_norms(tuned, traced_as_on_a_gpu):
    """All that a norm follows, but where an activation or a mean stands between; 4×4 pixels are no whole tile."""
    shapes, ran = tuned
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Network(torch.logspace(0, -1, 3), 1, 16, True).eval()
    x, level = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
    exact = copy.deepcopy(net).double()(x.double(), level)
    net, x, level = net.to(DEVICE, memory_format=NHWC), x.to(DEVICE), level.to(DEVICE)
    fast = accelerate(net, (1, 8, 8))
    joined = [norm for what, norm in fast.report.replaced.items() if "convolution before it" in what]
    shapes |= {"norm", "sum and norm"}
    found = fast(x, level)
    most = 2e-6 if DEVICE == "cpu" else 1e-4  # cuDNN's algorithms are less exact; a wrong join is off by O(1)
    assert (found.double().cpu() - exact).norm() <= most * exact.norm()
    assert [len(norms) for norms in joined] == [64]
    assert ran.count((False, True)) == 9 and ran.count((True, True)) == 8 and len(ran) == 17


class LateLevel(torch.nn.Module):
    """A norm whose level is made after the convolution, and a convolution that somebody else reads before the norm."""

    def __init__(self):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 1) for _ in range(3))
        self.norms = torch.nn.ModuleList(ConditionalInstanceNormPlus(16, 3) for _ in range(3))

    def forward(self, x, level):
        late = self.convs[0](x)
        x = self.norms[0](late, level * 1)
        early = self.convs[1](x)
        x = x + early.tanh()
        x = self.norms[1](early, level) + x
        both = self.convs[2](x)
        return self.norms[2](both + x, level) + both  # the convolution itself is read too


@torch.no_grad()
def test_what_cannot_be_joined(tuned, traced_as_on_a_gpu):
    shapes, _ = tuned
    shapes |= {"norm", "sum and norm"}
    net = LateLevel().eval().to(DEVICE, memory_format=NHWC)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE).contiguous(memory_format=NHWC)
    fast = accelerate(net, (16, 8, 8))
    assert fast.report.replaced["norm with the convolution before it, where the table has both"] == ["norms.1"]
    assert not any("network between" in why for why in fast.report.left)
    level = torch.tensor([2, 0], device=DEVICE)
    torch.testing.assert_close(fast(x, level), net(x, level), rtol=1e-5, atol=1e-5)


run_interpreted(globals())
