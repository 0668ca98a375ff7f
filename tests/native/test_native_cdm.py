"""Classification diffusion models in the native executor: forward and input gradient against float64 autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Norm, Table
from tests.native.classifiers import LEVELS, gradient_of, gradients_agree, question, score64, small, worst
from tests.native.layers import bits_of_any_threads, relative_error

SHAPES = {
    "one resolution": {"multipliers": (1,), "attention": ()},
    "attention at both": {"attention": (12, 6), "width": 32},
    "patches of 2": {"image_size": 20, "patch": 2, "attention": (5,)},
    "fourier": {"fourier": (1, 3, 5, 7)},
    "as cdm_mnist_small": {"image_size": 14, "patch": 2, "fourier": (1, 3, 5, 7), "baseline": (-0.74, 0.62)},
    "odd sizes, three resolutions": {"image_size": 13, "multipliers": (1, 2, 3), "channels": 3, "attention": (7, 4)},
    "down to one pixel": {"image_size": 4, "multipliers": (1, 1, 2), "attention": (1,)},
    "widths off the vector": {"width": 20, "multipliers": (1, 3), "features": 11, "blocks": 2},
}


@pytest.mark.parametrize("name", SHAPES)
def test_score_of_every_shape(name):
    model = small(**SHAPES[name])
    x, level = question(model, 3)
    want = score64(model, x, level)
    network = NativeNetwork(model, 3, *model.shape[1:])
    assert worst(network(x, level), want) < 5e-6
    assert worst(score64(small(1, **SHAPES[name]), x, level), want) > 1e-2  # the weights do matter


@pytest.mark.parametrize("schedule", ["ddpm", "uniform", "flow", "ve_geometric"])
@pytest.mark.parametrize("baseline", [None, (-0.74, 0.62)])
def test_score_of_every_schedule(schedule, baseline):
    model = small(schedule=schedule, baseline=baseline, attention=())
    x, level = question(model, 6)
    assert worst(NativeNetwork(model, 6, 12, 12)(x, level), score64(model, x, level)) < 5e-6


def test_on_every_instruction_set(isa):
    model = small(**SHAPES["as cdm_mnist_small"])
    x, level = question(model, 2)
    assert worst(NativeNetwork(model, 2, 14, 14)(x, level), score64(model, x, level)) < 5e-6


def test_other_precisions():
    model = small()
    x, level = question(model, 2)
    want = score64(model, x, level)
    for precision in ("direct", "winograd"):
        assert worst(NativeNetwork(model, 2, 12, 12, precision)(x, level), want) < 5e-6
    assert 1e-4 < worst(NativeNetwork(model, 2, 12, 12, "bfloat16")(x, level), want) < 3e-2


def group_norm(channels, groups):
    gamma, beta = (torch.randn(channels) for _ in range(2))
    tables = (Table(lambda: gamma[None]), None, Table(lambda: beta[None]))
    return Norm(channels, groups, 1e-5, tables), lambda x: F.group_norm(x, groups, gamma.double(), beta.double())


def attend(x):
    q, k, v = x.flatten(2).chunk(3, 1)
    weight = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(2)
    return (v @ weight.transpose(1, 2)).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (7, 5)])
def test_gradient_of_each_layer(isa, size):
    torch.manual_seed(0)
    x, gamma = torch.randn(2, 6, *size), torch.randn(64)
    convs = {f"{k}, stride {s}": nn.Conv2d(6, 21, k, s, k // 2) for k, s in ((1, 1), (3, 1), (3, 2), (5, 1))}
    own = {name: copy.deepcopy(conv).double() for name, conv in convs.items()}
    cases = {name: (lambda g, v, c=convs[name]: g.conv(v, c), own[name]) for name in convs}
    for groups in (1, 2, 6):
        norm, norm64 = group_norm(6, groups)
        for activation, f in (("silu", F.silu), ("none", lambda y: y)):
            if groups == 6 and size == (1, 1):
                continue  # one number a group: no gradient
            cases[f"norm, {groups} groups, {activation}"] = (
                lambda g, v, n=norm, a=activation: g.conv(v, convs["3, stride 1"], n, a),
                lambda x, n=norm64, f=f: own["3, stride 1"](f(n(x))),
            )
    first, first64, third = convs["1, stride 1"], own["1, stride 1"], convs["3, stride 1"]
    wide, wide64 = group_norm(21, 7)  # groups of 3 lie across vectors
    cases["norm across vectors"] = (
        lambda g, v: g.conv(g.conv(v, first), Kernel.of(last), wide, "silu"),
        lambda x: last64(F.silu(wide64(first64(x)))),
    )
    last = nn.Conv2d(21, 4, 3, padding=1)
    last64 = copy.deepcopy(last).double()
    cropped = tuple(max(2 * n - 1, 1) for n in size)
    cases["nearest"] = (
        lambda g, v: g.nearest(v, *cropped),
        lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : cropped[0], : cropped[1]],
    )
    cases["concat"] = (
        lambda g, v: g.concat(g.conv(v, first), g.conv(v, third, add=[g.conv(v, first)])),
        lambda x: torch.cat([first64(x), own["3, stride 1"](x) + first64(x)], 1),
    )
    cases["attention"] = (
        lambda g, v: g.attention(g.conv(v, Kernel.of(first).split(3, 16)), 7),
        lambda x: attend(first64(x)),
    )
    gradients_agree(cases, x, gamma)


def test_waves_at_high_frequencies():
    """sin and cos of 2⁷·π·u hold the digits of u: 1e-6 where float32 arithmetic on the angle loses two."""
    torch.manual_seed(0)
    x, conv = 30 * torch.randn(2, 2, 6, 4), nn.Conv2d(2 * 5 * 4, 8, 1)
    x64, own, gamma = x.double().requires_grad_(), copy.deepcopy(conv).double(), torch.randn(8)
    planes = [x64] + [f(2**n * torch.pi * x64) for n in (0, 7) for f in (torch.sin, torch.cos)]
    out = own(F.pixel_unshuffle(torch.cat(planes, 1), 2))
    want = torch.autograd.grad((F.silu(out) * gamma[:, None, None].double()).sum(), x64)[0]
    assert relative_error(gradient_of(lambda g, v: g.conv(v, conv), x, gamma, (0, 7), 2), want) < 1e-6


def test_bits_depend_on_neither_threads_nor_neighbours(threads):
    model = small(**SHAPES["as cdm_mnist_small"], width=32, attention=(7,))
    x, level = question(model, 11)
    network = NativeNetwork(model, 11, 14, 14)
    want = bits_of_any_threads(network, x, level, threads, (1, 2, 3, 5))
    assert not torch.equal(network(x, (level + 1) % LEVELS), want)
    alone = []
    for n in (1, 3):  # planned for one thread an image, and for three
        threads(n)
        alone.append(NativeNetwork(model, 1, 14, 14)(x[:1], level[:1]))
    assert torch.equal(*alone)
