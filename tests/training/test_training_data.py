"""Training data in every format, the order a run reads it in, and NCSNv2's rules for levels and steps."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from sgm_engine.data.images import Batches, dequantise, load_images, read_idx
from sgm_engine.training.advice import advise, largest_distance, levels, step_lr, variance_ratio

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (30, 1, 6, 6), dtype=np.uint8)


def idx(images):
    return b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes()


def test_mnist(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(GREY[:20, 0])))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(GREY[20:, 0]))
    np.testing.assert_array_equal(load_images(tmp_path), GREY[:20])
    np.testing.assert_array_equal(load_images(tmp_path, "test"), GREY[20:])


def test_cifar10(tmp_path):
    images = RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    rows = np.concatenate([np.arange(5, dtype=np.uint8)[:, None], images.reshape(5, -1)], 1)
    (tmp_path / "data_batch_1.bin").write_bytes(rows[:2].tobytes())
    (tmp_path / "data_batch_2.bin.gz").write_bytes(gzip.compress(rows[2:4].tobytes()))
    (tmp_path / "test_batch.bin").write_bytes(rows[4:].tobytes())
    np.testing.assert_array_equal(load_images(tmp_path), images[:4])
    np.testing.assert_array_equal(load_images(tmp_path, "test"), images[4:])


@pytest.mark.parametrize("channels_last", [False, True])
def test_npy(tmp_path, channels_last):
    np.save(tmp_path / "train.npy", GREY.transpose(0, 2, 3, 1) if channels_last else GREY)
    np.testing.assert_array_equal(load_images(tmp_path), GREY)
    np.testing.assert_array_equal(load_images(tmp_path / "train.npy"), GREY)
    assert len(load_images(tmp_path, "test")) == 0


def test_folder_of_pictures(tmp_path):
    (tmp_path / "train" / "deep").mkdir(parents=True)
    colour = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "train" / "a.png")
    Image.fromarray(np.full((10, 20), 7, np.uint8)).save(tmp_path / "train" / "deep" / "b.png")
    images = load_images(tmp_path, size=8)
    np.testing.assert_array_equal(images[0], colour.transpose(2, 0, 1))
    assert images.shape == (2, 3, 8, 8) and (images[1] == 7).all()


def test_a_size_that_divides_takes_means_of_blocks(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (3, 1, 6, 6), dtype=np.uint8)
    np.save(tmp_path / "train.npy", images)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(idx(images[:, 0]))
    mean = np.array([[[[block.mean() for block in np.split(row, 3, 1)] for row in np.split(x[0], 3)]] for x in images])
    for data in (tmp_path, tmp_path / "idx"):
        np.testing.assert_array_equal(load_images(data, size=3), np.floor(mean + 0.5))
        np.testing.assert_array_equal(load_images(data, size=6), images)
        with pytest.raises(ValueError, match="image_size must divide the side of images of 6×6, got 4"):
            load_images(data, size=4)


BAD = {
    "not an IDX": ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + b"\0" * 20, "not an IDX file"),
    "truncated": ("train-images-idx3-ubyte", idx(GREY[:, 0])[:-1], "truncated or damaged"),
    "truncated gzip": ("train-images-idx3-ubyte.gz", gzip.compress(idx(GREY[:, 0]))[:-9], "damaged or no gzip"),
    "cifar": ("data_batch_1.bin", b"\0" * 3074, "not a multiple of 3,073"),
    "picture": ("a.png", b"not a picture", "not a readable picture"),
    "nothing": ("readme.txt", b"", "no pictures there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(tmp_path, case):
    name, content, words = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_images(tmp_path, size=8)


def test_bad_npy(tmp_path):
    np.save(tmp_path / "x.npy", GREY.astype(np.float32))
    with pytest.raises(ValueError, match=r"must be uint8 .* got float32"):
        load_images(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="data format must be one of mnist"):
        load_images(tmp_path, form="tfrecord")


def test_read_idx_labels(tmp_path):
    (tmp_path / "labels").write_bytes(b"\0\0\x08\x01" + np.array([3], ">u4").tobytes() + bytes([7, 0, 9]))
    assert read_idx(tmp_path / "labels").tolist() == [7, 0, 9]


def test_dequantisation_fills_each_value_evenly():
    x = torch.arange(256, dtype=torch.uint8).expand(4, 256)
    u = torch.tensor([0, 0.25, 0.5, 1 - 2**-16])[:, None].expand(4, 256)
    y = dequantise(x, u)
    assert y.min() == 0 and y.max() < 1 and torch.equal((y * 256).floor().to(torch.uint8), x)


# -- order -------------------------------------------------------------------------------------------------------------


def values(batches, first, last):
    return torch.cat([batches.read(t)[:, 0, 0, 0] for t in range(first, last)]).tolist()


NUMBERED = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1)


def test_an_epoch_is_a_permutation_and_the_next_another():
    batches = Batches(NUMBERED, 7, seed=1)
    stream = values(batches, 0, 13)  # 91 images: three epochs and one
    epochs = [stream[i : i + 30] for i in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(30))
    assert values(Batches(NUMBERED, 7, seed=2), 0, 13) != stream


def test_order_does_not_depend_on_processes_or_where_it_starts():
    whole = values(Batches(NUMBERED, 8, seed=1), 0, 10)
    halves = [Batches(NUMBERED, 4, seed=1, rank=r, world=2) for r in (0, 1)]
    assert [v for t in range(10) for half in halves for v in values(half, t, t + 1)] == whole
    late = iter(Batches(NUMBERED, 8, seed=1, start=lambda: 6))
    assert next(late)[:, 0, 0, 0].tolist() == whole[48:56]


@pytest.mark.parametrize("images, batch, words", [(NUMBERED[:0], 4, "there are none"), (NUMBERED, 0, "batch must be")])
def test_bad_batches(images, batch, words):
    with pytest.raises(ValueError, match=words):
        Batches(images, batch)


# -- NCSNv2's rules against its published table ------------------------------------------------------------------------

PUBLISHED = {  # σ_1, L, step_lr, T, elements of an image
    "CIFAR-10": (50, 232, 6.2e-6, 5, 3 * 32**2),
    "CelebA": (90, 500, 3.3e-6, 5, 3 * 64**2),
    "church": (140, 788, 4.9e-6, 4, 3 * 96**2),
    "tower": (190, 1086, 1.8e-6, 3, 3 * 128**2),
    "FFHQ": (348, 2311, 9e-7, 3, 3 * 256**2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_levels_of_the_published_models(name):
    sigma_begin, count, _, _, dim = PUBLISHED[name]
    assert abs(levels(sigma_begin, 0.01, dim) - count) <= 1


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "church"])
def test_step_sizes_of_the_published_models(name):
    sigma_begin, count, published, steps, _ = PUBLISHED[name]
    gamma = (sigma_begin / 0.01) ** (1 / (count - 1))
    assert step_lr(gamma, steps) == pytest.approx(published, rel=0.02)


def test_church_does_not_follow_the_rule():
    """Its published step is twice what technique 4 gives, and its variance ratio is the worse one."""
    gamma = (140 / 0.01) ** (1 / 787)
    assert step_lr(gamma, 4) == pytest.approx(2.31e-6, rel=0.01)
    assert variance_ratio(step_lr(gamma, 4) / 1e-4, gamma, 4) < variance_ratio(0.049, gamma, 4)


def test_variance_ratio_is_the_recursion():
    a, gamma, variance = 0.06, 1.04, 1.04**2
    for _ in range(5):
        variance = (1 - a) ** 2 * variance + 2 * a
    assert variance_ratio(a, gamma, 5) == pytest.approx(variance, rel=1e-12)


def test_largest_distance():
    images = RNG.integers(0, 256, (1203, 1, 4, 4), dtype=np.uint8)
    flat = images.reshape(1203, -1) / 255
    exact = max(((flat[i] - flat) ** 2).sum(1).max() for i in range(1203)) ** 0.5
    assert largest_distance(images) == pytest.approx(exact, rel=1e-5)
    assert largest_distance(images, limit=300) <= exact * (1 + 1e-5)  # of fewer images, in float32


def test_advice_of_the_command(sgm, tmp_path):
    images = RNG.integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    said = sgm("train", "--advise", "--data", "x.npy")
    assert said.returncode == 0 and f"levels: {advise(images).levels}\n" in said.stdout
    assert "step_lr: " in said.stdout
    missing = sgm("train", "--advise")
    assert missing.returncode == 2 and "--data is missing" in missing.stderr


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: levels(1, 2, 100), "need 0 < sigma_end < sigma_begin"),
        (lambda: levels(2, 1, 4), "too small for this rule"),
        (lambda: levels(2, 1, 100, overlap=1), "overlap must lie in"),
        (lambda: step_lr(1.0, 5), "gamma must be above 1"),
        (lambda: advise(np.zeros((3, 1, 8, 8), np.uint8)), "all alike"),
    ],
)
def test_bad_advice(call, words):
    with pytest.raises(ValueError, match=words):
        call()
