"""precision="float8" of an engine, emulated: scales, which layers take part, live weights, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.engine.engine import Engine
from sgm_engine.kernels import reference
from sgm_engine.rewriting.float8.config import Float8Config, convolutions, qualifies
from sgm_engine.rewriting.float8.conv import Float8Conv
from sgm_engine.tuning.float8_calibration import calibrate_float8
from tests.rewriting.float8_networks import PLAN, net, scales  # noqa: F401 - fixtures


def test_what_is_rounded_to_float8():
    """By the definition of e4m3: four bits of exponent, three of mantissa, no infinities, 448 the largest."""
    exact = torch.tensor(
        [2.0**e * (1 + m / 8) for e in range(-6, 9) for m in range(8)][:-1] + [m / 512 for m in range(8)]
    )
    assert torch.equal(reference.quantised(exact, 1.0).float(), exact) and exact.max() == 448
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 200
    nearest = exact[(x.abs()[:, None] - exact).abs().argmin(1)] * x.sign()
    assert torch.equal(reference.quantised(x, 1.0).float(), nearest)
    edges = torch.tensor([1e9, -1e9, torch.inf, 464.0, 17.0, 19.0, torch.nan])  # the last numbers: ties to even
    assert reference.quantised(edges, 1.0).float().tolist()[:-1] == [448, -448, 448, 448, 16, 20]
    assert reference.quantised(edges, 1.0).float()[-1].isnan()


def test_a_layer_is_the_convolution_of_rounded_operands():
    conv = nn.Conv2d(32, 64, 3, padding=2, dilation=2)
    nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conv.weight[3] *= 1000  # a scale of its own for each output channel
        conv.weight[5] = 0
    layer = Float8Conv(conv, inverse=8.0, emulate=True)
    layer.load(conv)
    x = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(1))
    weight = layer.weight.double() * (layer.scale * 8.0)[:, None, None, None]
    grid = weight.abs().amax((1, 2, 3)) / 448
    assert (weight - conv.weight).abs().le(conv.weight.abs() / 16 + grid[:, None, None, None] / 512).all()
    inputs = reference.quantised(x, 8.0).double() / 8
    want = F.conv2d(inputs, weight, conv.bias.double(), padding=2, dilation=2)
    with torch.no_grad():
        found = layer(x)
        assert found.dtype == torch.bfloat16 and torch.equal(layer(reference.quantised(x, 8.0)), found)
    assert ((found - want).abs() <= want.abs() / 256 + 1e-4).all()


def test_which_convolutions_qualify():
    assert qualifies(nn.Conv2d(32, 64, 3, padding=1)) and qualifies(nn.Conv2d(64, 96, 3, padding=4, dilation=4))
    other = {"stride": 2, "groups": 2, "padding_mode": "reflect", "dilation": 2, "padding": "same"}
    assert not any(qualifies(nn.Conv2d(32, 32, 3, **{"padding": 1, name: value})) for name, value in other.items())
    assert not any(qualifies(c) for c in (nn.Conv2d(32, 32, 1), nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 32)))
    assert not qualifies(nn.Conv2d(32, 48, 3, padding=1)) and qualifies(nn.Conv2d(8, 8, 3, padding=1), channels=8)
    hooked = nn.Conv2d(32, 32, 3, padding=1)
    hooked.register_forward_hook(lambda *_: None)
    assert not qualifies(hooked)


def test_a_calibration_keeps_the_largest_input_of_each_layer(net, scales):
    largest = {}

    def keep(name):
        def hook(m, inputs):
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    hooks = [conv.register_forward_pre_hook(keep(name)) for name, conv in convolutions(net).items()]
    Engine(net, 4, precision="bfloat16", executor="eager").sample(4, 0, PLAN)
    assert scales.maxima == {name: largest[name] for name in ("inside.0", "inside.1")}
    for hook in hooks:
        hook.remove()
    assert scales.source == "4 samples of annealed_langevin, 7 evaluations, levels 0 to 2, seed 0"
    assert not any(m._forward_pre_hooks for m in net.modules()), "the user's module is left as it was"


def test_the_default_run_goes_through_every_level(net):
    found = calibrate_float8(net, 2, emulate=True)
    assert found.source == "2 samples of consistent_annealed, 60 evaluations, levels 0 to 2, seed 0"


def test_a_calibration_of_what_diverges(net):
    with torch.no_grad():
        net.first.weight.fill_(torch.nan)
    with pytest.raises((ValueError, RuntimeError), match="non-finite"):
        calibrate_float8(net, 2, plan=PLAN, emulate=True)


def test_scales_as_text(scales):
    assert Float8Config.from_json(scales.to_json()) == scales
    assert scales.digest == replace(scales, source="elsewhere").digest != replace(scales, margin=4.0).digest
    for text in ("", "[]", "{}", json.dumps({"format": "sgm-float8", "maxima": {"a": -1}}), '{"format": "sgm-plan"}'):
        with pytest.raises(ValueError, match="not a float8 calibration"):
            Float8Config.from_json(text)
