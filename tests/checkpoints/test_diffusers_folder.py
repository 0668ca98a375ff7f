"""diffusers folders: read, drawn from as diffusers' own pipelines draw, and written back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sgm_engine import load_checkpoint
from sgm_engine.checkpoints.checkpoint import convert
from tests.family_files import diffusers_folder, refused


def test_a_diffusers_folder_there_and_back(tmp_path):
    network = diffusers_folder(tmp_path / "pipe")
    model = load_checkpoint(tmp_path / "pipe")
    assert model.shape == (3, 8, 8) and model.config.preconditioning["prediction"] == "epsilon"
    for name, value in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)
    convert(tmp_path / "pipe", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", f"{tmp_path}/back/")
    convert(f"{tmp_path}/back", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "pipe" / file).read_bytes()
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) | {"_diffusers_version": 0} == json.loads(
            (tmp_path / "pipe" / name).read_text()
        ) | {"_diffusers_version": 0}
    old = tmp_path / "old"  # names of attention before they were to_q, …; and PyTorch's own format
    shutil.copytree(tmp_path / "pipe", old)
    names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    state = load_file(old / file)
    for new, before in names:
        state = {k.replace(f".{new}.", f".{before}."): v for k, v in state.items()}
    (old / file).unlink()
    torch.save(state, old / "unet" / "diffusion_pytorch_model.bin")
    assert torch.equal(load_checkpoint(old).network.state_dict()["conv_in.weight"], network.conv_in.weight)


def test_folders_that_cannot_be_read(tmp_path):
    def changed(name, file, **fields):
        folder = tmp_path / name
        diffusers_folder(folder)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return refused(folder)

    assert "a FluxTransformer" in changed("a", "unet/config.json", _class_name="a FluxTransformer")
    scheduler = "scheduler/scheduler_config.json"
    assert "FlowMatchEulerDiscreteScheduler" in changed("b", scheduler, _class_name="FlowMatchEulerDiscreteScheduler")
    assert "rescale_betas_zero_snr" in changed("c", scheduler, rescale_betas_zero_snr=True)
    assert "down_block_types must be one of" in changed(
        "d", "unet/config.json", down_block_types=["SkipDownBlock2D"] * 2
    )
    assert "lacks " in changed("e", "unet/config.json", layers_per_block=2)
    assert "asks for cross_attention_dim" in changed("f", "unet/config.json", cross_attention_dim=768)
    assert "prediction_type 'flow'" in changed("g", scheduler, prediction_type="flow")
    assert "whose unet is no UNet2DModel" in changed(
        "h", "model_index.json", unet=["diffusers", "UNet2DConditionModel"]
    )
    diffusers_folder(tmp_path / "i")
    (tmp_path / "i" / scheduler).unlink()
    assert "has no scheduler_config.json" in refused(tmp_path / "i")
    (tmp_path / "empty").mkdir()
    assert "nor a diffusers folder" in refused(tmp_path / "empty")


def test_hf_names_from_the_local_cache(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--tiny-ddpm"
    diffusers_folder(repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    assert load_checkpoint("hf:someone/tiny-ddpm").shape == (3, 8, 8)
    assert "cannot be fetched" in refused("hf:someone/other")
