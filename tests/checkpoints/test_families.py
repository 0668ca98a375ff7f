"""A checkpoint of any family loads by itself, to the network that its authors' code computes."""

import pytest
import torch

from sgm_engine import Engine, load_checkpoint, save_checkpoint
from sgm_engine.checkpoints.checkpoint import convert
from tests.family_files import (
    TINY_EDM2,
    diffusers_folder,
    edm2_network,
    edm2_pickle,
    golden,
    listed,
    lucidrains_file,
    refused,
    relative,
    same_network,
    score_sde_files,
)

ADM_FLAGS = "--image_size 32 --num_heads 4 --class_cond True --attention_resolutions 16,32 --use_scale_shift_norm False"


@pytest.mark.parametrize(
    "name, said", [("score_sde_ncsnpp_ve_32", "NCSN++ (VE)"), ("score_sde_ddpmpp_vp_32", "DDPM++ (VP)")]
)
def test_score_sde(tmp_path, name, said):
    path, config = score_sde_files(tmp_path, name)
    model = load_checkpoint(path, config)
    assert said in model.config.family and model.averaged and model.shape == (3, 32, 32)
    same_network(model, name, 0.5)
    raw = load_checkpoint(path, config, ema=False)
    assert not raw.averaged
    same_network(raw, name)
    x, level = torch.rand(2, 3, 32, 32), torch.tensor([2, 20])
    with torch.no_grad():
        found = raw(x, level)
        y, sigma = (x, raw.sigmas[level]) if "ve" in name else (2 * x - 1, 2 * raw.sigmas[level])
        if "ve" in name:
            expected = raw.network(y, sigma)
        else:
            mean = (1 + sigma[:, None, None, None] ** 2).rsqrt()
            expected = -2 * raw.network(mean * y, raw.told[level]) / sigma[:, None, None, None]
    assert relative(found, expected.double()) < 1e-6
    assert "pass config=" in refused(path)


def test_a_config_of_score_sde_is_read_and_never_run(tmp_path):
    path, config = score_sde_files(tmp_path, "score_sde_ncsnpp_ve_32")
    text = config.read_text()
    config.write_text("raise SystemExit\n" + text + "\nopen('ran', 'w')\n")
    assert load_checkpoint(path, config).config.preconditioning == {"name": "score"}
    for change, said in (
        (("'vesde'", "'flow'"), "training.sde 'flow'"),
        (("nf = 16", "nf = sixteen()"), "lacks model.nf"),
        (("'swish'", "'elu'"), "model.nonlinearity 'elu'"),
        (("ch_mult = (1, 2, 2)", "ch_mult = (1, 2, 2, 2)"), "does not fit NCSNpp: lacks "),
        (("nf = 16", "nf = 32"), "of shape [16], where [32] belongs"),
        (
            ("default_cifar10_configs", "default_church_configs"),
            "imports default_church_configs.py, which is not beside it",
        ),
        (("default_cifar10_configs", "default_celeba_configs"), "holds sigmas from 50, but its config says"),
        (("def get_config", "def other"), "defines none of get_config"),
        (("import torch", "import ("), "is not Python"),
    ):
        config.write_text(text.replace(*change))
        assert said in refused(path, config), change


@pytest.mark.parametrize("name", ["improved_diffusion_32_labels", "adm_64"])
def test_adm_from_shapes_and_flags(tmp_path, name):
    config, state, tensors = golden(name)
    path = tmp_path / "ema_0.9999_050000.pt"
    torch.save(state, path)
    flags = ADM_FLAGS if name.startswith("improved") else (
        "--image_size 64 --num_head_channels 16 --use_new_attention_order True --noise_schedule cosine")  # fmt: skip
    model = load_checkpoint(path, flags, class_labels=7 if config["class_cond"] else None)
    network = model.config.network
    assert network["channel_mult"] == listed(config["channel_mult"]) and network["num_res_blocks"] == 1
    assert network["learn_sigma"] == config["learn_sigma"] and network["resblock_updown"] == config["resblock_updown"]
    assert network["use_scale_shift_norm"] == config["use_scale_shift_norm"]
    same_network(model, name)
    labels = torch.tensor(config["labels"]) if config["labels"] else None
    with torch.no_grad():
        assert relative(model.network.whole(tensors["x"], tensors["told"], labels), tensors["out_f64"]) < 5e-6
    assert "pass the flags of its training" in refused(path)


def test_adm_asks_for_what_decides(tmp_path):
    _, state, _ = golden("improved_diffusion_32_labels")
    path = tmp_path / "model.pt"
    torch.save(state, path)
    for change, said in (
        (("--num_heads 4", ""), "neither --num_heads nor --num_head_channels"),
        (("--image_size 32", ""), "add --image_size"),
        (("--class_cond True", "--class_cond False"), "class_cond True by its tensors, but its flags say 'False'"),
        (("--image_size 32", "--image_size 32 --diffusion_steps 4000"), "--rescale_timesteps True"),
        (("--image_size 32", "--image_size 32 --noise_schedule sqrt"), "noise_schedule 'sqrt'"),
        (("--image_size 32", "--image_size 32 --depth 4"), "unknown flags: depth"),
    ):
        assert said in refused(path, ADM_FLAGS.replace(*change))
    with pytest.raises(ValueError, match="has 1000 classes: choose one"):
        Engine(load_checkpoint(path, ADM_FLAGS), batch=1, executor="eager").sample(1)
    flags = ADM_FLAGS + " --diffusion_steps 4000 --rescale_timesteps True"
    model = load_checkpoint(path, flags, class_labels=0)
    assert len(model.config.preconditioning["alphas_cumprod"]) == 4000 and model.config.preconditioning["scale"] == 0.25
    published = tmp_path / "cifar10_uncond_50M_500K.pt"  # flags by its name; these weights are another network's
    torch.save(state, published)
    assert "attention_resolutions [32, 16] by its tensors, but its flags say '16,8'" in refused(published)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_lucidrains(tmp_path, objective):
    path = tmp_path / "model-9.pt"
    network = lucidrains_file(path, objective)
    model = load_checkpoint(path, image_size=16)
    kinds = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
    assert model.config.preconditioning["prediction"] == kinds[objective] and model.averaged
    raw = load_checkpoint(path, image_size=16, ema=False)
    for name, value in network.state_dict().items():
        assert torch.equal(raw.network.state_dict()[name], value)
        assert torch.equal(model.network.state_dict()[name], value * 0.5)
    assert "pass image_size=" in refused(path)
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    assert "without its GaussianDiffusion" in refused(tmp_path / "bare.pt", image_size=16)


def test_our_own_format_holds_every_family(tmp_path):
    path, config = score_sde_files(tmp_path, "score_sde_ddpmpp_vp_32")
    model = load_checkpoint(path, config)
    save_checkpoint(model, tmp_path / "a.safetensors")
    again = load_checkpoint(tmp_path / "a.safetensors")
    assert again.config.to_json() == model.config.to_json() and torch.equal(again.sigmas, model.sigmas)
    save_checkpoint(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert "leave out config" in refused(tmp_path / "a.safetensors", config)
    assert "class_label must be" in refused(tmp_path / "a.safetensors", class_labels=1)
    with pytest.raises(ValueError, match="a diffusers folder holds a UNet2DModel, not a NCSNpp"):
        convert(tmp_path / "a.safetensors", f"{tmp_path}/folder/")


def test_lightning_with_an_average_beside_the_network(tmp_path):
    _, config = score_sde_files(tmp_path, "score_sde_ddpmpp_vp_32")
    state = golden("score_sde_ddpmpp_vp_32")[1]
    both = {f"score_net.{k}": v for k, v in state.items()} | {f"ema.score_net.{k}": v / 2 for k, v in state.items()}
    content = {"state_dict": both, "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.6.6", "loops": {},
               "hyper_parameters": {"lr": 1e-4}, "callbacks": {}, "optimizer_states": []}  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    model = load_checkpoint(tmp_path / "last.ckpt", config)
    assert model.averaged
    same_network(model, "score_sde_ddpmpp_vp_32", 0.5)
    same_network(load_checkpoint(tmp_path / "last.ckpt", config, ema=False), "score_sde_ddpmpp_vp_32")


def test_tensors_alone_and_the_record_of_their_family(tmp_path):
    """Networks of EDM2 and diffusers in Lightning's file: config= says what it lacks, a record or its JSON."""
    diffusers_folder(tmp_path / "pipe")
    edm2_pickle(tmp_path / "n.pkl", edm2_network(), TINY_EDM2)
    for source, said in (("n.pkl", "holds an EDM2 network's tensors alone"), ("pipe", "holds a UNet2DModel's tensors")):
        model = load_checkpoint(tmp_path / source)
        state = {f"net.{k}": v for k, v in model.network.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.6.6"}, tmp_path / "last.ckpt")
        assert said in refused(tmp_path / "last.ckpt")
        (tmp_path / "record.json").write_text(model.config.to_json())
        for config in (model.config, tmp_path / "record.json"):
            found = load_checkpoint(tmp_path / "last.ckpt", config)
            assert found.config == model.config
            assert all(torch.equal(v, found.network.state_dict()[k]) for k, v in model.network.state_dict().items())
    other = load_checkpoint(tmp_path / "n.pkl").config
    assert "does not fit EDM2UNet: lacks " in refused(tmp_path / "last.ckpt", other)
    (tmp_path / "record.json").write_text('{"architecture": "UNet2D"}')
    assert "config lacks fields: channels" in refused(tmp_path / "last.ckpt", tmp_path / "record.json")
    assert "nothing.json" in refused(tmp_path / "last.ckpt", tmp_path / "nothing.json")
