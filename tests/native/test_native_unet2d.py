"""diffusers' UNet2DModel as a user has it: whole on the native executor, its samples those of a plain float64 loop."""

import copy
import warnings

import pytest
import torch

from sgm_engine import _C
from sgm_engine.engine.engine import Engine
from sgm_engine.models.score_model import as_score
from sgm_engine.plans.plan import ddim
from tests.native.layers import relative_error

diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
STEPS = [900, 700, 400, 100]


def unet(**options):
    torch.manual_seed(0)
    settings = {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }  # fmt: skip
    return diffusers.UNet2DModel(**settings | options).eval()


KINDS = {
    "heads of 8": {},
    "one head, padded below and right": {"attention_head_dim": None, "downsample_padding": 0},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "act_fn": "gelu"},
    "classes": {"num_class_embeds": 5},
    "residual resampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "a learned variance": {"out_channels": 6},
}


def score_of(network, options):
    given = {"given": {"class_labels": 3}} if "num_class_embeds" in options else {}
    variance = {"learned_variance": True} if options.get("out_channels") == 6 else {}
    return as_score(network, "vp_noise_prediction", None, None, ALPHAS, STEPS, **given, **variance)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_plain_float64_loop(kind):
    """DDIM by hand, in float64, from the engine's own start."""
    network = unet(**KINDS[kind])
    score = score_of(network, KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine(score, 2, shape=(3, 16, 16))
    assert engine.executor == "native"
    start = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * score.sigmas[0]
    found = engine.sample(2, plan=ddim(score.sigmas), init=start)
    exact, x, sigmas = copy.deepcopy(network).double(), start.double(), ((1 - ALPHAS) / ALPHAS).sqrt()[STEPS]
    for i, t in enumerate(STEPS):
        told = {"class_labels": torch.full((2,), 3)} if "num_class_embeds" in KINDS[kind] else {}
        noise = exact(x / (1 + sigmas[i] ** 2).sqrt(), t, **told).sample[:, :3]
        x = x + ((sigmas[i + 1] if i + 1 < len(STEPS) else 0) - sigmas[i]) * noise
    assert relative_error(found, x) < 1e-5


@torch.no_grad()
def test_the_same_bits_for_any_number_of_threads():
    score = score_of(unet(), {})
    engine, found, before = Engine(score, 3, shape=(3, 16, 16)), [], _C.num_threads()
    try:
        for threads in (1, 2, 3):
            _C.set_num_threads(threads)
            found.append(engine.sample(3, plan=ddim(score.sigmas)))
    finally:
        _C.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
