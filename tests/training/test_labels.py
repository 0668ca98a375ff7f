"""Labels, hidden labels, dropout and the rate's steps in training, from data to a file."""

import gzip

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]: pip install 'sgm-engine[train]'")

from sgm_engine import load_checkpoint
from sgm_engine.data.images import Batches, load_labels
from sgm_engine.models.cdm.model import DDM
from sgm_engine.training.config import TrainConfig
from sgm_engine.training.module import ScoreModule
from tests.native.classifiers import small
from tests.training.test_cdm_training import CONFIG, workplace  # noqa: F401 - fixture

TOLD = CONFIG.replace("baseline: [0.0, 0.6]", "labels: 3\n  dropout: 0.2").replace("sample_every: 2", "sample_every: 0")


@pytest.fixture
def told(workplace):
    (workplace / "tiny.yaml").write_text(TOLD)
    for split in ("train", "test"):
        np.save(workplace / f"{split}_labels.npy", np.arange(32) % 3)
    return workplace


def test_train_resume_and_draw_a_label(told, sgm):
    command = ("train", "--config", "tiny.yaml", "--data", ".", "--accelerator", "cpu", "--out")
    assert sgm(*command, "run", "--set", "validate_every=2").returncode == 0
    assert sgm(*command, "half", "--set", "steps=2").returncode == 0
    assert "resumed at step 2" in sgm(*command, "half").stdout
    one, two = (load_checkpoint(told / f"{name}/model.safetensors") for name in ("run", "half"))
    assert one.labels == 3
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    options = ("--checkpoint", "run/model.safetensors", "--n", 2, "--out", "x.npz")
    said = sgm("sample", *options, "--class-labels", 1, "--guidance", 2)
    assert said.returncode == 0 and "class 1, guidance 2" in said.stdout
    assert "class_label must be one of" in sgm("sample", *options, "--class-labels", 3).stderr
    assert "guidance must be 1 without a class_label" in sgm("sample", *options, "--guidance", 2).stderr
    assert "has no classes" in sgm("sample", "--guidance", 2).stderr
    np.save(told / "train_labels.npy", np.arange(32) % 4)
    assert "labels from 0 to 3" in sgm(*command, "other").stderr
    (told / "train_labels.npy").unlink()
    assert "holds no labels" in sgm(*command, "other").stderr


def test_labels_of_each_kind_of_data(tmp_path):
    labels = np.arange(7, dtype=np.uint8) % 3
    for name, form in (("a", gzip.open), ("b", open)):
        (tmp_path / name).mkdir()
        end = ".gz" if name == "a" else ""
        with form(tmp_path / name / f"train-labels-idx1-ubyte{end}", "wb") as file:
            file.write(b"\0\0\x08\x01" + (7).to_bytes(4, "big") + labels.tobytes())
        (tmp_path / name / "train-images-idx3-ubyte").write_bytes(b"")
        assert load_labels(tmp_path / name).tolist() == labels.tolist()
        assert load_labels(tmp_path / name, "test") is None
    (tmp_path / "c").mkdir()
    for i in (1, 2):
        records = np.full((2, 3073), i, np.uint8)
        (tmp_path / "c" / f"data_batch_{i}.bin").write_bytes(records.tobytes())
    assert load_labels(tmp_path / "c").tolist() == [1, 1, 2, 2]


def test_batches_keep_images_and_labels_together():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    batches = Batches(images, 4, seed=1, rank=0, world=1, labels=np.arange(10) * 3)
    for t in range(4):
        x, labels = batches.read(t)
        assert (x.flatten().long() * 3 == labels).all()
    with pytest.raises(ValueError, match="labels: 9 of 10 images"):
        Batches(images, 4, labels=np.arange(9))


def test_a_share_of_labels_is_hidden():
    model, seen = small(labels=3), []

    def objective(network, x, levels, key, labels=None):
        seen.append(labels)
        return x.sum()

    module = ScoreModule(model, objective, label_dropout=0.25)
    module._objective = lambda: objective
    x, own = torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 3
    module.loss(x, torch.arange(4000), own)
    hidden = seen[0] == 3
    assert abs(float(hidden.float().mean()) - 0.25) < 0.03 and torch.equal(seen[0][~hidden], own[~hidden])
    module.loss(x[:5], torch.arange(5) + 100, own[100:105])  # a function of the sample alone
    assert torch.equal(seen[1], seen[0][100:105])
    with pytest.raises(ValueError, match="3 labels needs batches of images and labels"):
        module._parts(x)
    with pytest.raises(ValueError, match="label_dropout must lie in"):
        ScoreModule(model, "cdm", label_dropout=1.0)


def test_the_rate_falls_in_steps_as_published():
    module = ScoreModule(small(), "cdm", warmup=5000, drop_every=200_000)
    rates = [module.learning_rate(step) for step in (0, 2499, 4999, 199_999, 200_000, 400_000)]
    assert rates == pytest.approx([1 / 5000, 0.5, 1.0, 1.0, 0.1, 0.01])


def test_a_denoiser_is_trained_from_its_configuration():
    config = TrainConfig.read("ddm_mnist")
    assert config.model(1, 28).denoiser and "denoiser" in config.model(1, 28).to_json()
    assert type(config.model(1, 28).build()) is DDM
    twin = TrainConfig.read("cdm_mnist")
    same = ("ngf", "levels", "batch", "lr", "beta2", "ema", "clip", "decay")
    assert all(getattr(config, f) == getattr(twin, f) for f in same) and config.network == twin.network
