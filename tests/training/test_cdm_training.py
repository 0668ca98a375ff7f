"""``sgm train`` of a classification diffusion model: the same trainer, the same files."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]: pip install 'sgm-engine[train]'")

from sgm_engine import Engine, load_checkpoint, save_checkpoint
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.cdm.model import CDM
from sgm_engine.training.config import TrainConfig, config_names

CONFIG = """
architecture: CDM
objective: cdm
ngf: 8
levels: 6
network:
  multipliers: [1, 2]
  blocks: 1
  attention: [4]
  schedule: vp_geometric
  schedule_options: {sigma_max: 10.0, sigma_min: 0.1}
  baseline: [0.0, 0.6]
steps: 4
batch: 4
lr: 1e-3
log_every: 1
sample_every: 2
save_every: 2
plan: {name: ddim, start_shift: 0.5}
"""


@pytest.fixture
def workplace(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    images = np.random.default_rng(0).integers(0, 256, (32, 1, 8, 8), dtype=np.uint8)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", images)
    return tmp_path


def test_train_resume_and_sample(workplace, sgm):
    command = ("train", "--config", "tiny.yaml", "--data", ".", "--accelerator", "cpu", "--out")
    assert sgm(*command, "run", "--set", "validate_every=2").returncode == 0
    model = load_checkpoint(workplace / "run/model.safetensors")
    assert isinstance(model, CDM) and model.shape == (1, 8, 8) and not model.training
    assert (workplace / "run/samples/00000004.png").exists()
    assert sgm(*command, "half", "--set", "steps=2").returncode == 0
    resumed = sgm(*command, "half")
    assert "resumed at step 2" in resumed.stdout
    again = load_checkpoint(workplace / "half/model.safetensors")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    drawn = sgm("sample", "--checkpoint", "run/model.safetensors", "--n", 4, "--batch", 4, "--out", "x.safetensors")
    assert drawn.returncode == 0 and "6 NFE a sample" in drawn.stdout


def test_the_objective_says_which_config(workplace, sgm, monkeypatch):
    seen = []
    monkeypatch.setattr(TrainConfig, "read", lambda name, changes: seen.append((name, changes)) or 1 / 0)
    for arguments in (("--objective", "cdm"), ("--objective", "cdm", "--config", "tiny.yaml")):
        with pytest.raises(ZeroDivisionError):
            sgm("train", "--data", ".", "--out", "run", *arguments)
    assert seen == [("cdm_mnist", {"objective": "cdm"}), ("tiny.yaml", {"objective": "cdm"})]
    with pytest.raises(ZeroDivisionError):
        sgm("train", "--data", ".", "--out", "run", "--objective", "multi_sample", "--copies", 4)
    assert seen[2] == ("mnist_multi_sample", {"objective": "multi_sample", "copies": 4})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "denoising"}, "objective must be cdm or ddm if, and only if, the architecture is CDM"),
        ({"architecture": "NCSN", "objective": "denoising", "sigma_begin": 1.0}, "network must be empty for NCSN"),
        (
            {"network": {"schedule": "ddpm", "multipliers": [1], "blocks": 1, "depth": 3}},
            "unknown fields: depth",
        ),
        ({"network": {"schedule": "sine", "multipliers": [1], "blocks": 1}}, "schedule must be one of ddpm"),
        ({"network": {"schedule": "ddpm", "multipliers": [], "blocks": 1}}, "multipliers must name at least one"),
        ({"network": {"schedule": "ddpm", "multipliers": [1], "blocks": 0}}, "blocks must be an integer between 1"),
        ({"levels": 0}, "levels must be between 1 and"),
        ({"network": {"schedule": "ddpm", "multipliers": [1], "blocks": 1, "schedule_options": {"x": 1}}}, "beta_min"),
    ],
)
def test_bad_configs_are_named(workplace, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(workplace / "tiny.yaml", changes)


def test_every_bundled_config_builds():
    for name in config_names():
        config = TrainConfig.read(name)
        if config.architecture == "CDM":
            size = 28 if "mnist" in name else 32
            with torch.device("meta"):
                model = config.model(1 if size == 28 else 3, size).build()
            assert CDMConfig.from_dict(json.loads(model.config.to_json())) == model.config
            print(name, sum(p.numel() for p in model.parameters()))


def test_a_file_in_half_precision(tmp_path, workplace):
    torch.manual_seed(0)
    model = TrainConfig.read(workplace / "tiny.yaml").model(1, 8).build().eval()
    save_checkpoint(model, tmp_path / "half.safetensors", torch.float16)
    again = load_checkpoint(tmp_path / "half.safetensors")
    x = Engine(again, 2).sample(2)
    assert x.shape == (2, 1, 8, 8) and x.isfinite().all()
