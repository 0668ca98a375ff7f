"""A stable target over further images of the whole set, from Python and from the command line."""

import numpy as np
import pytest
import torch

from sgm_engine.keys import Key
from sgm_engine.training.objectives import stable_target
from sgm_engine.training.reference import ReferenceBatch
from sgm_engine.training.toy import ScoreMLP

IMAGES = np.arange(40, dtype=np.uint8).repeat(4).reshape(40, 1, 2, 2)


def key(t, n=4, seed=3):
    return Key(seed, torch.arange(t * n, t * n + n))


def test_points_are_independent_images_of_the_whole_set():
    reference = ReferenceBatch(IMAGES, 5000)
    x = reference.points(key(0))
    index = (256 * x[:, 0, 0, 0]).floor().long()
    counts = index.bincount(minlength=40)
    assert x.shape == (5000, 1, 2, 2) and x.dtype == torch.float32
    assert ((counts - 125).abs() < 5 * 125**0.5).all()  # with replacement, each as likely
    within = 256 * x - index.view(-1, 1, 1, 1)
    assert within.min() >= 0 and within.max() <= 1 and abs(within.mean() - 0.5) < 0.01  # dequantised, pixel by pixel
    assert torch.equal(x, ReferenceBatch(IMAGES, 5000).points(key(0)))
    assert not torch.equal(x, reference.points(key(1))) and not torch.equal(x, reference.points(key(0, seed=4)))


def test_flips():
    images = np.zeros((3, 1, 1, 2), np.uint8)
    images[..., 1] = 200
    x = ReferenceBatch(images, 400, flip=True).points(key(0))
    right = (x[..., 1] > x[..., 0]).double().mean().item()
    assert 0.4 < right < 0.6
    assert (ReferenceBatch(images, 400).points(key(0))[..., 1] > 0.5).all()


def test_the_objective_is_stable_target_over_both():
    reference, model = ReferenceBatch(IMAGES, 7, anneal_power=1.0), ScoreMLP([1.0, 0.1], dim=4)
    x, levels = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 1, 0])
    want = stable_target(model, x, levels, key(2), reference=reference.points(key(2)), anneal_power=1.0)
    assert torch.equal(reference(model, x, levels, key(2)), want)
    assert reference(model, x, levels, key(2), reduction="none").shape == (4,)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        ReferenceBatch(IMAGES, 0)


def test_from_the_command_line(sgm, tmp_path):
    pytest.importorskip("lightning", reason="pip install 'sgm-engine[train]'")
    np.save(tmp_path / "train.npy", np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), np.uint8))
    common = ("train", "--config", "mnist_tiny", "--data", ".", "--accelerator", "cpu", "--reference-batch", 6)
    small = ("--set", "ngf=4", "levels=2", "batch=4", "steps=2", "sample_every=0")
    done = sgm(*common, "--objective", "stable_target", "--out", "run", *small)
    assert done.returncode == 0, done.stderr
    assert "reference_batch: 6" in (tmp_path / "run" / "config.yaml").read_text()
    wrong = sgm(*common, "--out", "w", *small)
    assert wrong.returncode == 2 and "reference_batch must be 0 unless the objective is stable_target" in wrong.stderr
