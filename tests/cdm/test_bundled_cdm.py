"""The bundled classifier draws, and says how likely images are; and how bundled weights are named."""

import numpy as np
import pytest
import torch

from sgm_engine import Engine, load_bundled
from sgm_engine.cdm.report import others
from sgm_engine.checkpoints.bundled import bundled_names, bundled_path
from sgm_engine.evaluation.likelihood import image_bits
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.outputs.images import to_uint8


@pytest.fixture(scope="module")
def drawn():
    model, plan = load_bundled("cdm")
    samples = to_uint8(Engine(model, 16).sample(16, plan=plan))  # [N, H, W, C]
    return model, plan, samples.transpose(0, 3, 1, 2)


def test_it_is_small_and_carries_its_plan():
    model, plan = load_bundled("cdm_mnist")
    assert isinstance(model.config, CDMConfig) and model.shape == (1, 28, 28)
    assert bundled_path("cdm_mnist").stat().st_size <= 5e6
    assert (plan.name, plan.metadata["eta"], plan.nfe) == ("ancestral", 2.5, 128)
    assert abs(float(model.law.mean.mean()) - plan.start_shift) < 0.01  # of MNIST; 0.37 of it off leaves grey halos


def test_samples_are_strokes_on_black(drawn):
    _, _, images = drawn
    x = images / 255
    border = np.concatenate([x[:, 0, :2].ravel(), x[:, 0, -2:].ravel()])
    assert border.mean() < 0.03
    ink = (x > 0.5).mean((1, 2, 3))
    assert 0.02 < np.median(ink) < 0.35 and ((x < 0.1) | (x > 0.7)).mean() > 0.8


def test_one_pass_tells_its_digits_from_what_are_none(drawn):
    model, _, images = drawn
    bits = image_bits(model.log_prob, images)
    for name in ("uniform noise", "inverted", "pixels shuffled"):
        other = image_bits(model.log_prob, others(images, None)[name])
        assert bits.max() < other.min(), name


def test_what_the_table_ranks():
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 28, 28), dtype=np.uint8)
    found = others(images, np.random.default_rng(1).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    assert {x.shape for x in found.values()} == {images.shape} and len(found) == 6
    assert (found["upside down"] == images[:, :, ::-1]).all() and (found["inverted"] == 255 - images).all()
    assert (found["halves of two"][1, 0, :14] == images[1, 0, :14]).all()
    assert (found["halves of two"][1, 0, 14:] == images[0, 0, 14:]).all()
    assert (np.sort(found["pixels shuffled"].reshape(6, -1)) == np.sort(images.reshape(6, -1))).all()


def test_weights_by_name(sgm):
    assert bundled_names() == ["cdm_mnist", "mnist"]
    assert bundled_path("cdm") == bundled_path("cdm_mnist") and bundled_path() == bundled_path("mnist")
    for name in ("dcm", ""):
        with pytest.raises(ValueError, match="there are: cdm_mnist, mnist"):
            bundled_path(name)
    done = sgm(
        "sample", "--weights", "cdm", "--n", 2, "--batch", 2, "--nfe", 4, "--conditioning", "nearest", "--out", "x.npz"
    )
    assert done.returncode == 0 and "CDM, 1×28×28" in done.stdout, done.stderr
    assert np.load("x.npz")["arr_0"].shape == (2, 28, 28, 1)
    both = sgm("sample", "--weights", "cdm", "--checkpoint", "y.safetensors")
    assert both.returncode == 2 and "take one of the two" in both.stderr


def test_the_likelihood_is_one_forward_pass(drawn, monkeypatch):
    model, calls = drawn[0], []
    classifier = type(model.classifier)
    forward = classifier.forward
    monkeypatch.setattr(classifier, "forward", lambda self, u: calls.append(len(u)) or forward(self, u))
    with torch.no_grad():
        assert model.log_prob(torch.rand(3, 1, 28, 28)).shape == (3,)
    assert calls == [3]
