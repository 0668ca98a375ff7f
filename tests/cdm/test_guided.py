"""Samples that follow their labels: which noise they come from, and what counts as followed."""

import numpy as np
import pytest
import torch

from sgm_engine import Engine, ancestral, save_checkpoint
from sgm_engine.cdm import guided
from sgm_engine.evaluation.features import Extractor
from sgm_engine.outputs.images import to_uint8
from tests.cdm.potentials import potential

pytestmark = pytest.mark.filterwarnings("ignore:more than 1% of these values")  # of random networks


def test_labels_have_their_own_noise_and_weight_0_no_label():
    model = potential(labels=3)
    torch.nn.init.normal_(model.classifier.features.label, 0, 30)
    plan = ancestral(model.sigmas.tolist(), start_shift=0.5)
    images = guided.drawn(model, 2, 2.0, plan)
    assert images.shape == (3, 2, 8, 8, 1)
    told = Engine(model.with_class(1, 2.0)).sample(2, plan=plan, first_id=2)
    np.testing.assert_array_equal(images[1], to_uint8(told))
    plain = to_uint8(Engine(model).sample(6, plan=plan)).reshape(images.shape)
    without = guided.drawn(model, 2, 0.0, plan)
    assert np.abs(without.astype(int) - plain).max() <= 1 and np.abs(images.astype(int) - plain).max() > 1


def test_what_follows():
    """A classifier that reads its class off the first pixel."""
    images = np.zeros((3, 2, 4, 4, 1), np.uint8)
    images[:, :, 0, 0, 0] = [[0, 1], [1, 1], [0, 2]]
    reads = Extractor("reads", lambda x: (x.flatten(1), torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 3)))
    assert guided.followed(images, reads).tolist() == [[True, False], [True, True], [False, True]]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = potential(image_size=28, labels=10, levels=3, plan={"name": "ancestral", "start_shift": 0.5})
    save_checkpoint(model, tmp_path / "model.safetensors")
    head = b"\0\0\x08\x03" + np.array([40, 28, 28], ">u4").tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
    guided.main(["--checkpoint", "model.safetensors", "--data", ".", "--n", "2", "--out", "x.png"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["guidance", weight] for weight in "012"]
    assert all(0 <= float(line.split()[2]) <= 1 for line in lines[1:]) and (tmp_path / "x.png").exists()
    save_checkpoint(potential(), tmp_path / "none.safetensors")
    with pytest.raises(SystemExit):
        guided.main(["--checkpoint", "none.safetensors", "--data", "."])
    assert "none.safetensors knows no labels" in capsys.readouterr().err
