"""The networks of the diffusion families against their originals: golden outputs; diffusers where it is there."""

import pytest
import torch
from torch import nn

from sgm_engine.models.family import FamilyConfig
from sgm_engine.models.unet2d import UNet2D
from tests.family_files import GOLDEN, golden, network_of, relative


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def answer(name, config, network, tensors, dtype):
    """What the golden file holds: the network's output, or D of EDM's preconditioning around it."""
    x, told = tensors["x"].to(dtype), tensors["told"]
    labels = torch.tensor(config["labels"]) if config.get("labels") else None
    if name.startswith("score_sde"):
        return network(x, told)
    if not name.startswith("edm"):
        return network.whole(x, told, labels)
    if labels is not None:
        labels = nn.functional.one_hot(labels, config["label_dim"])
    sigma = told.to(dtype)[:, None, None, None]
    total = sigma**2 + 0.25
    found = network(x / total.sqrt(), sigma.flatten().log() / 4, labels)
    return 0.25 / total * x + sigma * 0.5 / total.sqrt() * found


@pytest.mark.parametrize("name", GOLDEN)
def test_networks_give_the_originals_outputs(name):
    config, state, tensors = golden(name)
    network = network_of(name, config)
    network.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k != "sigmas"})
    assert relative(answer(name, config, network, tensors, torch.float32), tensors["out_f64"]) < 5e-6
    # In float64 but for the sines of the time, which the authors take in float32.
    assert relative(answer(name, config, network.double(), tensors, torch.float64), tensors["out_f64"]) < 1e-7


UNETS = {
    "plain": {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "as google/ddpm": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "mid_block_scale_factor": 1.5,
    },
    "as ADM": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "layers_per_block": 2,
        "out_channels": 6,
        "num_class_embeds": 5,
        "center_input_sample": True,
    },
    "another activation": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "add_attention": False,
        "act_fn": "gelu",
    },
}


@pytest.mark.parametrize("kind", UNETS)
def test_unet2d_is_that_of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")
    common = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**common | UNETS[kind]).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ours = UNet2D(**{k: v for k, v in theirs.config.items() if not k.startswith("_")}).eval()
    ours.load_state_dict(theirs.state_dict())
    x, told = torch.randn(2, 3, 16, 16), torch.tensor([371, 7])
    labels = torch.tensor([3, 1]) if ours.num_classes else None
    expected = theirs.double()(x.double(), told, class_labels=labels, return_dict=False)[0]
    assert relative(ours.whole(x, told, labels), expected) < 5e-6
    assert relative(ours.double().whole(x.double(), told, labels), expected) < 1e-7
    half = ours(x.double(), told, labels)
    assert torch.equal(half, ours.whole(x.double(), told, labels)[:, :3])


def family(**changed):
    """A small DDPM++ as EDM trains it."""
    fields = {
        "architecture": "SongUNet",
        "network": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 16, "channel_mult": [1],
                    "num_blocks": 1, "attn_resolutions": []},
        "channels": 1, "image_size": 8, "preconditioning": {"name": "edm"}, "data_range": (-1.0, 1.0),
        "sigma_min": 0.002, "sigma_max": 80.0, "plan": {"name": "heun", "nfe": 35},
    }  # fmt: skip
    return FamilyConfig(**fields | changed)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
@pytest.mark.parametrize("name", ["edm", "vp", "sub_vp", "ve", "score", "ddpm"])
def test_a_score_in_units_of_data_between_0_and_1(name, low, high):
    """score(x) = (high − low)·(D(y) − y)/σ_y², with D from the textbook form of each scheme, in float64."""
    scheme = {"name": name}
    if name == "ddpm":
        scheme |= {"alphas_cumprod": torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0).tolist()}
    torch.manual_seed(0)
    model = family(preconditioning=scheme, data_range=(low, high), sigma_min=0.05, sigma_max=50.0).build().eval()
    x, level = torch.rand(3, 1, 8, 8), torch.tensor([0, 7, 17])
    told = model.told[level].double()
    span, sigma = high - low, model.sigmas[level].double()[:, None, None, None] * (high - low)
    y = span * x.double() + low
    network = model.network
    score = span * textbook(name, lambda v: network.double()(v, told), y, sigma)
    assert relative(model.float()(x, level), score) < 5e-6


def textbook(name, network, y, sigma):
    if name == "edm":
        total = sigma**2 + 0.25
        denoised = 0.25 / total * y + sigma * 0.5 / total.sqrt() * network(y / total.sqrt())
        return (denoised - y) / sigma**2
    if name == "ve":
        return network(y) / sigma
    if name == "score":
        return network(y)
    mean = (-sigma + (sigma**2 + 4).sqrt()) / 2 if name == "sub_vp" else 1 / (1 + sigma**2).sqrt()
    return -network(mean * y) / sigma


def test_a_family_trains_as_any_module_does():
    model = family().build().train()
    with torch.enable_grad():
        model(torch.rand(2, 1, 8, 8), torch.tensor([3, 9])).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(dict(model.named_parameters())) == {f"network.{n}" for n, _ in model.network.named_parameters()}


def test_times_of_a_diffusion_are_those_of_its_levels():
    model = family(preconditioning={"name": "vp"}, sigma_min=0.05, sigma_max=100.0).build()
    t = model.told.double() / 999
    variance = torch.expm1(19.9 * t**2 / 2 + 0.1 * t)
    assert torch.allclose(variance.sqrt() / 2, model.sigmas.double(), rtol=1e-4)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)
    trained = ((1 - alphas) / alphas).sqrt()
    ddpm = family(preconditioning={"name": "ddpm", "alphas_cumprod": alphas.tolist()},
                  sigma_min=trained[0].item(), sigma_max=trained[-1].item()).build()  # fmt: skip
    own = ddpm.at_sigmas(ddpm.levels(50, own=True))
    assert own.told.dtype == torch.int64 and own.told.tolist() == list(range(980, -1, -20))
    between = ddpm.at_sigmas([(trained[500] * trained[501]).sqrt().item() / 2])
    assert between.told.item() == pytest.approx(500.5, abs=1e-2)
    edges = ddpm.at_sigmas(ddpm.levels(2))
    assert edges.sigmas[0] * 2 == pytest.approx(trained[-1].item(), rel=1e-5)


def test_other_units_are_refused_not_extrapolated():
    model = family().build()
    with pytest.raises(ValueError, match=r"between 0\.001 and 40 .*trained on \[-1, 1\]\), got 80 to 0\.002"):
        model.at_sigmas([80.0, 1.0, 0.002])


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("architecture", "Perceiver", "architecture must be one of"),
        ("network", {"img_resolution": 8, "depth": 3}, "takes no depth"),
        ("network", {"img_resolution": 8, "num_blocks": 10**9}, "num_blocks must be numbers up to 64"),
        ("network", {"channel_mult": [1] * 1000}, "channel_mult must be numbers"),
        ("preconditioning", {"name": "rectified"}, "preconditioning must be one of"),
        ("preconditioning", {"name": "iddpm", "M": 10**9}, "M from 2 to 100000"),
        ("plan", {"name": "heun"}, "plan must have a name and nfe"),
        ("preconditioning", {"name": "edm", "beta": 1}, "not beta"),
        ("data_range", (1.0, -1.0), "data_range must be low < high"),
        ("sigma_min", 0.0, "sigma_min must be positive"),
        ("channels", 0, "channels must be integers between 1 and"),
        ("class_label", 3, "the network has no classes"),
    ],
)
def test_a_record_is_checked(field, value, said):
    with pytest.raises(ValueError, match=said):
        family(**{field: value})
