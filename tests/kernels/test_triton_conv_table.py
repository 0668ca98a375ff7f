"""The table of tuned convolutions, who asks it, and what follows a convolution that it names."""

import copy
import json

import pytest
import torch

from sgm_engine.kernels import norm_op, reference
from sgm_engine.kernels.tables import conv as conv_table
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton.conv import ConvTile
from sgm_engine.models.blocks import ConditionalInstanceNormPlus
from sgm_engine.rewriting import acceleration
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.chosen_conv import ChosenConv, ConvNorm, chosen
from sgm_engine.rewriting.recognise import recognise
from tests.interpreter import DEVICE, run_interpreted
from tests.kernels.triton_convolutions import (
    NHWC,
    SMALL,
    assert_as_accurate,
    float32,  # noqa: F401 - fixtures
    tensors,
)
from tests.plain_networks import Network


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


@torch.no_grad()
def test_a_convolution_adds_the_biases_that_its_norm_would(tuned):
    """Of the convolution and of the residual, each once, whoever adds them."""
    shapes, ran = tuned
    x, weight, bias, residual = tensors((2, 16, 8, 8), 32, 3, torch.float32)
    other = bias.flip(0) + 1
    conv = torch.nn.Conv2d(16, 32, 3, padding=2, dilation=2).to(DEVICE)
    conv.weight.copy_(weight), conv.bias.copy_(bias)
    norm = recognise(ConditionalInstanceNormPlus(32, 3).to(DEVICE))
    both = ConvNorm(ChosenConv(conv.to(memory_format=NHWC), biased=False), norm)
    given = {"level": torch.tensor([2, 0], device=DEVICE), "residual": residual}
    given |= {"bias": conv.bias, "residual_bias": other}
    plain = both(x, **given)
    assert not ran
    shapes.add("sum and norm")
    found = both(x, **given)
    assert ran == [(True, True)]
    for _, total in (plain, found):
        assert_as_accurate(total, x, weight, bias + other, residual, 2)
    torch.testing.assert_close(plain, found, rtol=1e-4, atol=1e-4)


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
