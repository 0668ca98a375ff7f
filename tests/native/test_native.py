"""The native executor: layers against float64, networks against the originals, chains against the eager executor."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.norm import Norm, Table, affine
from sgm_engine.kernels import reference
from sgm_engine.models.blocks import ConditionalInstanceNormPlus, InstanceNormPlus
from tests.native.layers import (
    relative_error,
    run_layers,
)

LEVELS = 3


def random_norm(channels, kind):
    norm = InstanceNormPlus(channels) if kind == "plain" else ConditionalInstanceNormPlus(channels, LEVELS)
    for p in norm.parameters():
        p.data.normal_(0.5, 0.5)
    return norm


def norm64(norm, x, level):
    if isinstance(norm, InstanceNormPlus):
        parts, level = (norm.gamma, norm.alpha, norm.beta), None
    else:
        parts = norm.embed.weight.split(norm.channels, dim=1)
    return reference.noise_conditioned_norm(x, *(p.detach().double() for p in parts), level, "none")


ACTIVATIONS = {"none": lambda x: x, "elu": F.elu, "relu": F.relu, "silu": F.silu}


def conv_reference(x, conv, norm, activation, adds, pool, level):
    """The layer in float64, and the norm of the same sums with every term positive: what rounding is relative to."""
    h = x.double()
    h = ACTIVATIONS[activation](h if norm is None else norm64(norm, h, level))
    weight, bias = conv.weight.detach().double(), None if conv.bias is None else conv.bias.detach().double()

    def layer(f):
        y = F.conv2d(f(h), f(weight), None if bias is None else f(bias), padding=conv.padding, dilation=conv.dilation)
        return (F.avg_pool2d(y, 2) if pool else y) + sum(map(f, adds))

    return layer(lambda t: t), layer(torch.abs).norm()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_convolutions_of_any_shape(data):
    """Down to one pixel, dilations beyond the image, channels that fill no vector, every prologue and epilogue."""
    draw = data.draw
    pool = draw(st.booleans())
    n = draw(st.integers(1, 3))
    height, width = draw(st.integers(2 if pool else 1, 11)), draw(st.integers(2 if pool else 1, 11))
    c_in, c_out = draw(st.integers(2, 21)), draw(st.integers(1, 35))
    kernel = 3 if pool else draw(st.sampled_from([1, 3, 3, 3]))
    dilation = 1 if pool or kernel == 1 else draw(st.sampled_from([1, 1, 2, 3, 4, 13]))
    kind, activation = draw(st.sampled_from(["absent", "plain", "by level"])), draw(st.sampled_from(list(ACTIVATIONS)))
    addends, bias = draw(st.integers(0, 2)), draw(st.booleans())
    precision = draw(st.sampled_from(["float32", "direct", "winograd"]))
    torch.manual_seed(draw(st.integers(0, 9)))
    x, level = torch.randn(n, c_in, height, width), torch.randint(LEVELS, (n,))
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias)
    norm = None if kind == "absent" else random_norm(c_in, kind)
    scales = [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False) for _ in range(addends)]

    def emit(graph, value):
        small = graph.mean_pool(value) if pool else value
        return graph.conv(value, conv, norm, activation, [graph.conv(small, s) for s in scales], pool)

    y = run_layers(emit, x, level, precision)
    small = F.avg_pool2d(x.double(), 2) if pool else x.double()
    adds = [F.conv2d(small, s.weight.detach().double(), padding=1) for s in scales]
    want, scale = conv_reference(x, conv, norm, activation, adds, pool, level)
    # InstanceNorm++ divides by the spread of the channels' means: below 0.01 it shows how they were rounded.
    spread = 1 if norm is None else (x.double().mean((2, 3)).var(1).min() + 1e-5).sqrt()
    assert (y - want).norm() < 1e-6 * scale * max(1, 0.01 / spread)


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("size", [(1, 3), (6, 10), (17, 32)])
def test_channels_of_nearly_one_mean(isa, size, mean):
    """Their variance is 5e-9, so that InstanceNorm++ multiplies the rounding of a mean by 300. Over 64 images."""
    torch.manual_seed(1)
    x = torch.randn(64, 2, *size) + mean
    x[:, 1] += (x[:, 0] - x[:, 1]).mean((1, 2), keepdim=True) + 1e-4
    norm = random_norm(2, "plain")
    want = norm64(norm, x.double(), None)
    parts = (p.detach() for p in (norm.gamma, norm.alpha, norm.beta))
    eager = reference.noise_conditioned_norm(x, *parts, None, "none")
    y = run_layers(lambda g, v: g.activate(v, "none", norm), x)
    assert (y - want).norm() <= 2 * (eager - want).norm()


@pytest.mark.parametrize("precision", ["float32", "direct", "winograd"])
def test_every_instruction_set(isa, precision):
    torch.manual_seed(0)
    x, level = torch.randn(3, 19, 9, 10), torch.tensor([2, 0, 1])
    conv, norm = nn.Conv2d(19, 37, 3, padding=2, dilation=2), random_norm(19, "by level")
    y = run_layers(lambda graph, v: graph.conv(v, conv, norm, "elu"), x, level, precision)
    want, scale = conv_reference(x, conv, norm, "elu", [], False, level)
    assert (y - want).norm() < 1e-6 * scale


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (14, 14)])
def test_layers_that_are_not_convolutions(isa, size):
    torch.manual_seed(0)
    x, level = torch.randn(2, 5, *size), torch.tensor([1, 2])
    norm = random_norm(5, "by level")
    x64 = x.double()
    cases = {
        "activate": (lambda g, v: g.activate(v, "elu", norm, [v]), F.elu(norm64(norm, x64, level)) + x64),
        "mean pool 5": (lambda g, v: g.pool5(v, "mean", norm), F.avg_pool2d(norm64(norm, x64, level), 5, 1, 2)),
        "max pool 5": (lambda g, v: g.pool5(v, "max"), F.max_pool2d(x64, 5, 1, 2)),
        "upsample": (
            lambda g, v: g.upsample(v, 2 * size[0], 3 * size[1]),
            F.interpolate(x64, size=(2 * size[0], 3 * size[1]), mode="bilinear", align_corners=True),
        ),
    }
    if min(size) > 1:
        cases["mean pool 2"] = (lambda g, v: g.mean_pool(v), F.avg_pool2d(x64, 2))
    for name, (emit, want) in cases.items():
        assert relative_error(run_layers(emit, x, level), want) < 2e-6, name


@pytest.mark.parametrize("precision", ["direct", "winograd"])
def test_statistics_survive_a_mean_far_from_zero(isa, precision):
    """|mean| is 800 std, on a grid that float32 holds exactly; E[x²] − E[x]² would keep hardly a digit of the std."""
    torch.manual_seed(0)
    x = 4096 + torch.randint(-8, 9, (2, 6, 16, 16)) / 8.0
    norm = random_norm(6, "plain")
    y = run_layers(lambda g, v: g.activate(g.conv(v, identity3(6)), "none", norm), x, precision=precision)
    # The direct sum is exact here. Winograd rounds at 4096, a relative 1e-7 · 4096 / std, before statistics are taken.
    assert relative_error(y, norm64(norm, x.double(), None)) < (1e-6 if precision == "direct" else 5e-3)


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 5)])
def test_layers_of_general_modules(isa, size):
    """GroupNorm, a norm without statistics, concatenation, nearest upsampling and strided convolutions."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, *size)
    x64 = x.double()
    groups, norm = nn.GroupNorm(3, 9), affine(9).then(Table(lambda: torch.full((1, 9), 2.0)), Table.of(1))
    nn.init.normal_(groups.weight), nn.init.normal_(groups.bias)
    larger = 2 * size[0], 3 * size[1]
    convs = [
        nn.Conv2d(9, 21, k, s, p, d)
        for k, s, p, d in ((1, 2, 0, 1), (3, 2, 1, 1), (5, 1, 2, 1), (3, 2, 2, 2), (7, 3, 3, 1))
    ]
    cases = {
        "groups": (lambda g, v: g.activate(v, "silu", groups), F.silu(copy.deepcopy(groups).double()(x64)).detach()),
        "affine": (lambda g, v: g.activate(v, "relu", norm), F.relu(2 * x64 + 1)),
        "nearest": (lambda g, v: g.nearest(v, *larger, [g.nearest(v, *larger)]),
                    2 * x64.repeat_interleave(2, 2).repeat_interleave(3, 3)),
        "concat": (lambda g, v: g.concat(v, g.concat(g.activate(v, "elu"), v)), torch.cat([x64, F.elu(x64), x64], 1)),
    }  # fmt: skip
    for conv in convs:
        want = copy.deepcopy(conv).double()(F.silu(x64)).detach()
        cases[str(conv)] = (lambda g, v, conv=conv: g.conv(v, conv, None, "silu"), want)
    for name, (emit, want) in cases.items():
        assert relative_error(run_layers(emit, x), want) < 2e-6, name


def test_tables_of_another_size_are_refused():
    """By C++, which reads no float beyond what it is given."""
    x = torch.randn(2, 9, 4, 4)
    conv = nn.Conv2d(9, 9, 3, padding=1)
    graph = Graph(2, "float32")
    graph.store(graph.activate(graph.load(9, 4, 4), "none", Norm(9, 3, 1e-5)), conv)
    graph.plan()
    few = torch.ones(26)
    for call, message in (
        (lambda: graph.native.set_norm(0, (few.data_ptr(), 26)), "table must have 27 floats, got 26"),
        (lambda: graph.native.set_conv(0, (few.data_ptr(), 26), (0, 0)), "weight must have 729 floats, got 26"),
        (lambda: graph.native.set_sigmas((few.data_ptr(), 0)), "at least 1 float, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.isfinite(graph.run(x, torch.zeros(2, dtype=torch.int64), torch.empty_like(x))).all()
    with pytest.raises(
        RuntimeError, match=r"must match the existing size|invalid for input of size"
    ):  # γ of 1 channel is for all, one of 2 is for none
        run_layers(lambda g, v: g.activate(v, "none", affine(9).then(Table(lambda: torch.ones(1, 2)), Table.of(0))), x)


def identity3(channels):
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight)
    return conv
