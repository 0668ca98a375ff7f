"""``sgm sample --checkpoint FILE`` of every family against the authors' sampler as a loop in float64, in their units.

The loop knows the family's own formulas and constants, the averaged weights and the class; from the package it has the
network alone, which its golden outputs hold, and the noise that a chain begins with.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from sgm_engine import load_checkpoint
from sgm_engine.jobs.settings import settings
from sgm_engine.kernels import reference
from sgm_engine.plans.schedule import karras
from tests.edm2_reference import Reference
from tests.family_files import (
    TINY_EDM2,
    diffusers_folder,
    edm2_network,
    edm2_pickle,
    edm_arguments,
    edm_pickle,
    golden,
    lucidrains_file,
    network_of,
    relative,
    score_sde_files,
)

STEPS, SEED = 4, 11
BETAS = torch.linspace(1e-4, 0.02, 1000).double()
TRAINED = ((1 - torch.cumprod(1 - BETAS, 0)) / torch.cumprod(1 - BETAS, 0)).sqrt().numpy()


def original(name, scale=1.0):
    """The golden network in float64, its trained weights ``scale`` times the file's."""
    config, state, _ = golden(name)
    network = network_of(name, config)
    fixed = ("all_modules.0.W", "freqs", "resample_filter")
    state = {k.removeprefix("model."): v for k, v in state.items() if k != "sigmas"}
    network.load_state_dict({k: v if k.endswith(fixed) else scale * v for k, v in state.items()})
    return network, config


def edm_denoiser(network, label=None):
    def denoised(y, sigma):
        total = sigma**2 + 0.25
        told = torch.full((len(y),), np.log(sigma) / 4, dtype=torch.float64)
        return 0.25 / total * y + sigma * 0.5 / total**0.5 * network(y / total**0.5, told, label)

    return denoised


def time_of(sigma):
    """The timestep of a DDPM with linear β whose noise is σ, between two by ln σ."""
    return float(np.interp(np.log(sigma), np.log(TRAINED), np.arange(1000)))


def noise_denoiser(network, time, *rest):
    """D of a network that predicts the noise of a variance-preserving diffusion."""

    def denoised(y, sigma):
        told = torch.full((len(y),), time(sigma), dtype=torch.float64)
        return y - sigma * network(y / (1 + sigma**2) ** 0.5, told, *rest)

    return denoised


def ncsnpp(folder):
    path, config = score_sde_files(folder, "score_sde_ncsnpp_ve_32")
    network = original("score_sde_ncsnpp_ve_32", 0.5)[0].double()  # the average is half the weights
    ends = golden("score_sde_ncsnpp_ve_32")[0]

    def denoised(y, sigma):
        return y + sigma**2 * network(y, torch.full((len(y),), sigma, dtype=torch.float64))

    return (path, "--config", config), denoised, (0, ends["sigma_max"], ends["sigma_min"]), "averaged"


def ddpmpp(folder):
    path, config = score_sde_files(folder, "score_sde_ddpmpp_vp_32")
    network = original("score_sde_ddpmpp_vp_32", 0.5)[0].double()

    def time(sigma):  # ½·ln(1 + σ²) = ¼·19.9·t² + ½·0.1·t
        return 999 * (-0.05 + (0.05**2 + 19.9 * 0.5 * np.log1p(sigma**2)) ** 0.5) / (19.9 / 2)

    ends = [np.expm1(19.9 * t**2 / 2 + 0.1 * t) ** 0.5 for t in (1, 1e-3)]
    return (path, "--config", config), noise_denoiser(network, time), (-1, *ends), "averaged"


def edm(folder, name, label=None):
    network, config = original(name)
    path = edm_pickle(folder / "edm.pkl", network, edm_arguments(config), own={"sigma_data": 0.5})
    labels = None if label is None else one_hot(torch.tensor([label]), config["label_dim"])
    given = () if label is None else ("--class-labels", label)
    return (path, *given), edm_denoiser(network.double(), labels), (-1, 80, 0.002), "averaged"


def edm2(folder):
    network = edm2_network()
    path = edm2_pickle(folder / "edm2.pkl", network, TINY_EDM2)
    reference_network = Reference(network.state_dict(), 16)
    denoised = edm_denoiser(reference_network, one_hot(torch.tensor([4]), 5))
    return (path, "--class-labels", 4), denoised, (-1, 80, 0.002), "averaged"


def adm(folder, name, flags, labelled=False):
    network, config = original(name)
    torch.save(network.state_dict(), folder / "ema_0.9999_050000.pt")
    label = config["labels"][1] if labelled else None
    given = (folder / "ema_0.9999_050000.pt", "--config", flags, *(("--class-labels", label) if labelled else ()))
    denoised = noise_denoiser(network.double(), time_of, *([torch.tensor([label])] if labelled else []))
    return given, denoised, (-1, TRAINED[-1], TRAINED[0]), "averaged"


LEGACY = "--image_size 32 --num_heads 4 --class_cond True --attention_resolutions 16,32 --use_scale_shift_norm False"
NEW = "--image_size 64 --num_head_channels 16 --use_new_attention_order True"


def lucidrains(folder):
    network = lucidrains_file(folder / "model-9.pt")
    network.load_state_dict({k: v * 0.5 for k, v in network.state_dict().items()})
    network = network.double()

    def denoised(y, sigma):
        total = 1 + sigma**2
        found = network(y / total**0.5, torch.full((len(y),), time_of(sigma), dtype=torch.float64))
        return y / total - sigma / total**0.5 * found  # α·y_vp − √(1 − ᾱ)·v

    return (folder / "model-9.pt", "--image-size", 16), denoised, (-1, TRAINED[-1], TRAINED[0]), "averaged"


def diffusers(folder):
    network = diffusers_folder(folder / "pipe", num_class_embeds=4).double()
    denoised = noise_denoiser(network, time_of, torch.tensor([3]))
    return (folder / "pipe", "--class-labels", 3), denoised, (-1, TRAINED[-1], TRAINED[0]), "class 3"


FAMILIES = {
    "NCSN++": ncsnpp,
    "DDPM++": ddpmpp,
    "EDM ddpmpp": lambda folder: edm(folder, "edm_ddpmpp_32"),
    "EDM ncsnpp": lambda folder: edm(folder, "edm_ncsnpp_32"),
    "EDM adm": lambda folder: edm(folder, "edm_adm_32_labels", 1),
    "EDM2": edm2,
    "improved-diffusion": lambda folder: adm(folder, "improved_diffusion_32_labels", LEGACY, True),
    "ADM": lambda folder: adm(folder, "adm_64", NEW),
    "denoising-diffusion-pytorch": lucidrains,
    "diffusers": diffusers,
}


VARIANCE_PRESERVING = ("DDPM++", "improved-diffusion", "ADM", "denoising-diffusion-pytorch", "diffusers")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_command_draws_what_the_authors_would(sgm, tmp_path, family):
    given, denoised, (low, sigma_max, sigma_min), said = FAMILIES[family](tmp_path)
    out = tmp_path / "x.safetensors"
    run = sgm("sample", "--checkpoint", *given, "--sampler", "heun", "--nfe", 2 * STEPS - 1, "--n", 1, "--batch", 1,
              "--seed", SEED, "--out", out)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f", {said}, " in run.stdout and "executor native" in run.stdout
    x = load_file(out)["samples"]

    span = 1 - low
    sigmas = karras(min(sigma_max, 300), sigma_min, STEPS)
    scale = np.hypot(1, sigmas[0]) if family in VARIANCE_PRESERVING else sigmas[0]
    y = scale * reference.noise(x.shape, torch.tensor([SEED]), torch.tensor([0]), 0).double()
    for sigma, after in pairwise([*sigmas, 0.0]):
        slope = (y - denoised(y, sigma)) / sigma
        euler = y + (after - sigma) * slope
        y = euler if after == 0 else y + (after - sigma) * (slope + (euler - denoised(euler, after)) / after) / 2
    assert relative(span * x + low, y) < 2e-7 * sigmas[0]  # float32 rounds a chain that begins at σ by 6e-8·σ


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_there_and_back_is_the_same_bytes(sgm, tmp_path, family):
    given = [str(word) for word in FAMILIES[family](tmp_path)[0]]
    if "--class-labels" in given:
        given[given.index("--class-labels") :] = []
    source, *options = given
    assert sgm("convert", source, "a.safetensors", *options).returncode == 0
    assert sgm("convert", "a.safetensors", "b.safetensors").returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    model = load_checkpoint(tmp_path / "a.safetensors")
    theirs = load_checkpoint(source, **{o[2:].replace("-", "_"): int(v) if v.isdecimal() else v
                                        for o, v in zip(options[::2], options[1::2], strict=True)})  # fmt: skip
    assert model.config == theirs.config
    assert settings(model) == settings(theirs) == {}  # all of it is in the configuration
    assert all(torch.equal(v, model.network.state_dict()[k]) for k, v in theirs.network.state_dict().items())


def test_the_weights_themselves_where_they_are_asked_for(sgm, tmp_path):
    path, config = score_sde_files(tmp_path, "score_sde_ddpmpp_vp_32")
    common, drawn = ("--checkpoint", path, "--config", config, "--nfe", 2, "--n", 1, "--batch", 1), []
    for option in ("--ema", "--no-ema"):
        run = sgm("sample", *common, option, "--out", "x.safetensors")
        assert run.returncode == 0 and ("not averaged" in run.stdout) == (option == "--no-ema"), run.stderr
        drawn.append(load_file(tmp_path / "x.safetensors")["samples"])
    assert not torch.allclose(*drawn)
    assert "not averaged" in sgm("doctor", path, "--config", config, "--no-ema").stdout
