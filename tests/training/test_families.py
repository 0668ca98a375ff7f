"""``sgm train`` of the diffusion families: a config that names one, to weights that ``sgm sample`` draws from."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")
from sgm_engine import load_checkpoint
from sgm_engine.models.edm_unet import SongUNet
from sgm_engine.training.config import TrainConfig
from sgm_engine.training.families import training_levels
from sgm_engine.training.module import ScoreModule
from tests.family_files import edm_pickle

# Two kinds of image, dark above and dark below, eight times each.
STRIPES = np.tile(np.stack([np.repeat([30, 220], 4), np.repeat([220, 30], 4)]).astype(np.uint8), (8, 1))
STRIPES = np.ascontiguousarray(np.broadcast_to(STRIPES[:, None, :, None], (16, 1, 8, 8)))

CONFIGS = {
    "NCSNpp": "ngf: 8\nnetwork: {ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [4]}\n",
    "NCSN++": "ngf: 8\nnetwork: {ch_mult: [1], num_res_blocks: 1, attn_resolutions: [], embedding_type: fourier, "
    "scale_by_sigma: true}\n",
    "SongUNet": "ngf: 8\nnetwork: {channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [4]}\n",
    "DhariwalUNet": "ngf: 64\nnetwork: {channel_mult: [1], num_blocks: 1, attn_resolutions: []}\n",
    "EDM2UNet": "ngf: 16\nnetwork: {channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [4], "
    "channels_per_head: 16}\n",
    "ADMUNet": "ngf: 32\nnetwork: {channel_mult: [1], num_res_blocks: 1, attention_resolutions: [], num_heads: 2}\n",
    "UNet2D": "network: {block_out_channels: [8, 16], down_block_types: [DownBlock2D, AttnDownBlock2D], "
    "up_block_types: [AttnUpBlock2D, UpBlock2D], layers_per_block: 1, norm_num_groups: 4}\n",
    "Unet": "ngf: 8\nnetwork: {dim_mults: [1, 2], full_attn: [false, true], attn_heads: [2, 2], attn_dim_head: [4, 4], "
    "memories: [2, 2]}\n",
}
COMMON = "batch: 8\nlr: 5e-3\nema: 0.5\nlog_every: 4\nsave_every: 0\n"


def write(folder, name):
    kind = "NCSNpp" if name == "NCSN++" else name
    ddpm = kind in ("ADMUNet", "UNet2D", "Unet")
    ends = "levels: 1000\n" if ddpm else "levels: 50\nsigma_begin: 20.0\nsigma_end: 0.02\n"
    path = folder / "family.yaml"
    np.save(folder / "images.npy", STRIPES)
    path.write_text(f"architecture: {kind}\n" + ends + COMMON + CONFIGS[name])
    return path


def loss(network):
    """The denoising loss over all levels, of the same noise every time."""
    module = ScoreModule(network)
    with torch.no_grad():
        return module.loss(torch.from_numpy(np.repeat(STRIPES, 8, 0)), torch.arange(16 * 8)).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_trains_and_is_drawn_from(sgm, tmp_path, name):
    config = TrainConfig.read(write(tmp_path, name))
    run = sgm("train", "--config", "family.yaml", "--data", "images.npy", "--out", "run", "--accelerator", "cpu",
              "--set", "steps=24", "sample_every=24")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "samples" / "00000024.png").exists()
    model = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert model.config == config.model(1, 8) and model.shape == (1, 8, 8)
    levels = training_levels(config, model.config)
    torch.manual_seed(config.seed)
    before, after = (loss(m.at_sigmas(levels).eval()) for m in (config.model(1, 8).build(), model))
    assert after < 0.95 * before, (before, after)
    drawn = sgm("sample", "--checkpoint", "run/model.safetensors", "--n", 2, "--batch", 2, "--nfe", 5, "--out", "x.npz")
    assert drawn.returncode == 0, drawn.stderr
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (2, 8, 8, 1)


def small(**changed):
    fields = {"architecture": "SongUNet", "ngf": 8, "levels": 5, "sigma_begin": 20.0, "sigma_end": 0.02,
              "network": {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}}  # fmt: skip
    return TrainConfig(**fields | changed)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"sigma_begin": None}, "sigma_begin is missing: the first noise level of SongUNet"),
        ({"network": {"label_dim": 10}}, "network.label_dim must be left out: images of `sgm train` have no classes"),
        ({"network": {"in_channels": 3}}, "network.in_channels must be left out: ngf and the data say 1"),
        ({"network": {"model_channels": 3}}, "network.model_channels must be left out: ngf and the data say 8"),
        ({"network": {"depth": 3}}, "network of SongUNet takes no depth"),
        ({"divide_by_sigma": False}, "divide_by_sigma must be true for SongUNet"),
        ({"preconditioning": {"name": "flow"}}, "preconditioning must be one of edm, vp"),
        ({"preconditioning": {"name": "ddpm"}}, "sigma_begin must be left out: a ddpm's levels are those of its times"),
        ({"plan": {"name": "heun"}}, "plan must have a name and nfe"),
        ({"architecture": "UNet2D"}, "ngf must be left out for UNet2D: network.block_out_channels are its widths"),
        ({"architecture": "NCSNpp", "ngf": None, "network": {"ch_mult": [1]}},
         "ngf, network.num_res_blocks, network.attn_resolutions must be given for NCSNpp"),
        ({"architecture": "NCSN", "network": {}, "preconditioning": {"name": "edm"}}, "preconditioning must be empty"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_had(changed, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        small(**changed).model(1, 8)


def test_the_config_of_the_documentation(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    (tmp_path / "doc.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert TrainConfig.read(tmp_path / "doc.yaml").model(3, 32).build().shape == (3, 32, 32)


def test_levels_of_training():
    config = small()
    assert np.allclose(training_levels(config, config.model(1, 8)), np.geomspace(20, 0.02, 5))
    found = small(preconditioning={"name": "score"}, architecture="NCSNpp",
                  network={"ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}).model(1, 8)  # fmt: skip
    assert found.data_range == (0.0, 1.0) and (found.sigma_min, found.sigma_max) == (0.02, 20.0)
    ddpm = TrainConfig.read("ddpm_cifar10", {"levels": 1000})
    model = ddpm.model(3, 32).build()
    model = model.at_sigmas(training_levels(ddpm, model.config))
    assert model.told.tolist() == list(range(999, -1, -1))  # every timestep, as DDPM trains


def test_going_on_from_weights_of_the_same_network(sgm, tmp_path):
    """A published file, whatever its plan and its levels; another network is refused with what differs."""
    arguments = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1],
                 "num_blocks": 1, "attn_resolutions": []}  # fmt: skip
    torch.manual_seed(5)
    network = SongUNet(**arguments).eval()
    edm_pickle(tmp_path / "theirs.pkl", network, arguments)
    path = write(tmp_path, "SongUNet")
    common = ("--config", "family.yaml", "--data", "images.npy", "--init", "theirs.pkl", "--accelerator", "cpu")
    changes = ("--set", "steps=1", "sample_every=0", "lr=1e-30")
    refused = sgm("train", *common, "--out", "other", *changes)
    said = "holds another network: network.channel_mult [1], not [1, 2]; network.attn_resolutions [], not [4]"
    assert refused.returncode == 2 and f"theirs.pkl: {said}" in refused.stderr
    path.write_text(path.read_text().replace("[1, 2]", "[1]").replace("[4]", "[]"))
    run = sgm("train", *common, "--out", "run", *changes)
    assert run.returncode == 0, run.stderr
    trained = load_checkpoint(tmp_path / "run" / "model.safetensors").network.state_dict()
    assert all(torch.allclose(v, trained[n], rtol=0, atol=1e-20) for n, v in network.state_dict().items())


def test_a_trained_unet2d_is_a_diffusers_folder(sgm, tmp_path):
    write(tmp_path, "UNet2D")
    run = sgm("train", "--config", "family.yaml", "--data", "images.npy", "--out", "run", "--accelerator", "cpu",
              "--set", "steps=1", "sample_every=0",
              "preconditioning={name: ddpm, prediction_type: v_prediction}")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert sgm("convert", "run/model.safetensors", "pipe/").returncode == 0
    ours, theirs = load_checkpoint(tmp_path / "run" / "model.safetensors"), load_checkpoint(tmp_path / "pipe")
    assert theirs.config.preconditioning == ours.config.preconditioning
    assert theirs.config.preconditioning["prediction"] == "v_prediction" and theirs.config.clip is None
    x, level = torch.rand(1, 1, 8, 8), torch.tensor([3])
    assert torch.equal(ours(x, level), theirs(x, level))
