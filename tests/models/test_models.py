"""The networks against the originals' own outputs, names and shapes."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.models import NCSN, ModelConfig, NCSNv2, NCSNv2Deeper, NCSNv2Deepest

DATA = Path(__file__).parents[1] / "data"


def golden(name, cls, **kwargs):
    """(model with the golden weights, x, level, the original's float64 output)."""
    tensors = load_file(DATA / f"golden_{name}.safetensors")
    state = {key[6:]: value for key, value in tensors.items() if key.startswith("state.")}
    if state:
        model = cls(**kwargs)
        model.load_state_dict(state, strict=True)
    else:
        model = load_checkpoint(DATA / f"golden_{name}.pth", ema=False, sigmas=kwargs.get("sigmas"))
        assert type(model) is cls
    return model.eval(), tensors["x"], tensors["level"], tensors["score_f64"]


def geometric(begin, levels):
    return torch.linspace(torch.tensor(begin).double().log(), torch.tensor(0.01).double().log(), levels).exp().float()


GOLDEN = {
    "ncsn_28_ngf8": (NCSN, {"sigmas": geometric(1.0, 10), "channels": 1, "ngf": 8}),
    "ncsn_32_ngf8": (NCSN, {"sigmas": geometric(1.0, 10)}),
    "ncsnv2_32_ngf8": (NCSNv2, {}),
    "ncsnv2deeper_128_ngf4": (NCSNv2Deeper, {"sigmas": geometric(190.0, 1086), "channels": 3, "ngf": 4}),
}


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_output_is_the_originals(name):
    cls, kwargs = GOLDEN[name]
    model, x, level, expected = golden(name, cls, **kwargs)
    error = (model(x, level) - expected).norm() / expected.norm()
    assert error <= 2e-6


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_output_is_the_originals_in_channels_last(name):
    cls, kwargs = GOLDEN[name]
    model, x, level, expected = golden(name, cls, **kwargs)
    model.to(memory_format=torch.channels_last)
    error = (model(x.contiguous(memory_format=torch.channels_last), level) - expected).norm() / expected.norm()
    assert error <= 2e-6


@torch.no_grad()
def test_deepest_has_one_more_pooled_stage_than_deeper():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NCSNv2Deepest([2.0, 1.0], channels=3, ngf=2)
    names = set(model.state_dict()) - set(NCSNv2Deeper([2.0, 1.0], channels=3, ngf=2).state_dict())
    assert {name.split(".")[0] for name in names} == {"res31", "refine31"}
    x, level = torch.rand(1, 3, 64, 64), torch.tensor([1])
    shapes = {}
    for stage in model.stages:
        model._modules[stage.name].__getitem__(1).register_forward_hook(
            lambda _, __, out, name=stage.name: shapes.__setitem__(name, tuple(out.shape[1:]))
        )
    assert model(x, level).shape == x.shape
    assert shapes == {
        "res1": (2, 64, 64),
        "res2": (4, 32, 32),
        "res3": (4, 16, 16),
        "res31": (4, 8, 8),
        "res4": (8, 8, 8),
        "res5": (8, 8, 8),
    }


@pytest.mark.parametrize(
    ("name", "cls", "channels", "ngf", "levels", "millions"),
    [
        ("ncsn_cifar", NCSN, 3, 128, 10, 30.12),
        ("ncsn_mnist", NCSN, 1, 64, 10, 7.64),
        ("ncsnv2_cifar10", NCSNv2, 3, 128, 232, 29.69),
    ],
)
def test_full_size_names_and_shapes(name, cls, channels, ngf, levels, millions):
    sigmas = geometric(1.0, levels)
    with torch.device("meta"):
        model = cls(sigmas, channels, ngf)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == json.loads((DATA / f"{name}_state_shapes.json").read_text())
    assert sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_config_rebuilds_the_network():
    model = NCSNv2Deeper([3.0, 0.25], channels=2, ngf=2, image_size=64)
    model.plan = {"steps_per_level": 3, "step_lr": 1e-6, "denoise": True}
    config = ModelConfig.from_dict(json.loads(model.config.to_json()))
    assert config == model.config and config.plan == model.plan
    again = copy.deepcopy(config.build())  # the engine copies networks for bfloat16
    assert type(again) is NCSNv2Deeper and again.shape == (2, 64, 64) and again.plan == model.plan
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


GOOD = {
    "architecture": "NCSN",
    "channels": 1,
    "image_size": 28,
    "ngf": 8,
    "sigmas": [1.0, 0.1],
    "divide_by_sigma": False,
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "UNet", "architecture must be one of NCSN"),
        ("channels", 0, "channels must be an integer between 1"),
        ("channels", 1.0, "channels must be"),
        ("ngf", True, "ngf must be"),
        ("ngf", 10**9, "ngf must be"),
        ("image_size", 27, "image_size of NCSN must divide by 2"),
        ("sigmas", [0.1, 1.0], "sigmas must descend"),
        ("sigmas", [1.0, -0.1], "sigmas must be positive"),
        ("sigmas", [1.0, float("nan")], "sigmas must be positive and finite"),
        ("sigmas", [], "sigmas must be a list of 1"),
        ("sigmas", ["1.0", "0.1"], "sigmas must hold numbers"),
        ("divide_by_sigma", "false", "divide_by_sigma must be true or false"),
        ("plan", {"step_lr": float("inf")}, r"plan\['step_lr'\] must be finite"),
        ("plan", {"step_lr": [1]}, r"plan\['step_lr'\] must be a number"),
        ("plan", "fast", "plan must be an object"),
        ("colour", "red", "unknown fields: colour"),
    ],
)
def test_bad_config_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(GOOD | {field: value})
    with pytest.raises(ValueError, match="config lacks fields: ngf"):
        ModelConfig.from_dict({k: v for k, v in GOOD.items() if k != "ngf"})
