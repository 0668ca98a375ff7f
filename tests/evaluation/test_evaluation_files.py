"""What the evaluation reads: sets of images, the classifier that it trains, users' extractors; and the command."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from sgm_engine.data.sets import from_array, open_images
from sgm_engine.outputs.output import Output
from tests.evaluation.image_files import (
    IMAGES,
    LAST,
    mnist,  # noqa: F401 - fixtures
)


def forms(folder):
    np.savez(folder / "plain.npz", arr_0=LAST)
    np.savez_compressed(folder / "packed.npz", other=np.zeros(3), arr_0=LAST)
    np.save(folder / "last.npy", LAST)
    np.save(folder / "first.npy", IMAGES)
    np.save(folder / "float.npy", LAST.astype(np.float64) / 255)
    ids = np.arange(11)
    for name in ("x.safetensors", "x.npz"):
        Output.parse(str(folder / name)).write(IMAGES.astype(np.float32) / 255, ids)
    (folder / "x").mkdir()
    for i, image in enumerate(LAST):
        Image.fromarray(image).save(folder / f"x/{i:03d}.png")
    (folder / "parts").mkdir()
    np.savez(folder / "parts/b.npz", arr_0=LAST[4:])
    np.savez(folder / "parts/a.npz", arr_0=LAST[:4])
    names = ["plain.npz", "packed.npz", "last.npy", "first.npy", "float.npy", "x.safetensors", "x.npz", "x", "parts"]
    return [folder / name for name in names]


def test_every_form_holds_the_same_images_in_blocks_of_any_size(tmp_path):
    for path in forms(tmp_path):
        images = open_images(path)
        assert (len(images), tuple(images.shape)) == (11, (3, 6, 5)), path
        for size in (1, 4, 11, 50):
            blocks = [*images.blocks(size)]
            assert max(map(len, blocks)) <= size and blocks[0].dtype == torch.uint8
            assert np.array_equal(torch.cat(blocks).numpy(), IMAGES), (path, size)


def test_files_join_in_the_order_given(tmp_path):
    paths = forms(tmp_path)
    joined = open_images(paths[0], paths[5])
    assert np.array_equal(joined.all().numpy(), np.concatenate([IMAGES, IMAGES]))
    grey = np.zeros((3, 6, 5), np.uint8)
    np.save(tmp_path / "grey.npy", grey)
    with pytest.raises(ValueError, match=r"grey.npy holds images \(1, 6, 5\)"):
        open_images(paths[0], tmp_path / "grey.npy")


def test_floats_are_clamped_and_rounded_as_written_files_are():
    x = np.zeros((600, 1, 1, 1), np.float32)  # a few samples may lie far outside
    x[:6, 0, 0, 0] = [-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0]
    assert from_array(x).all().flatten().tolist() == [0, 0, 0, 1, 255, 255] + [0] * 594


def test_mnist_and_cifar_folders_with_labels(tmp_path, mnist):
    train, test = open_images(f"{mnist}:train"), open_images(f"{mnist}:test")
    assert (len(train), len(test), train.shape) == (40, 20, (1, 8, 8)) and train.labels.tolist() == [0, 1] * 20
    assert len(open_images(mnist)) == 40
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (7, 3073), dtype=np.uint8)
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar/data_batch_1.bin").write_bytes(records[:4].tobytes())
    (tmp_path / "cifar/data_batch_2.bin.gz").write_bytes(gzip.compress(records[4:].tobytes()))
    (tmp_path / "cifar/test_batch.bin").write_bytes(records[:2].tobytes())
    cifar = open_images(tmp_path / "cifar")
    assert np.array_equal(cifar.all().numpy().reshape(7, 3072), records[:, 1:])
    assert cifar.labels.tolist() == records[:, 0].tolist() and len(open_images(f"{tmp_path}/cifar:test")) == 2


def test_take_is_a_subset_without_repetition():
    images = from_array(np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1), "all", torch.arange(100))
    some = images.take(30, seed=1)
    values = torch.cat([*some.blocks(7)]).flatten().tolist()
    assert len(some) == len(set(values)) == 30 and values == sorted(values) == some.labels.tolist()
    assert images.take(30, seed=2).labels.tolist() != values and images.take(500) is images


def test_unreadable_images_are_named(tmp_path, mnist):
    np.savez(tmp_path / "other.npz", x=LAST)
    np.save(tmp_path / "flat.npy", np.zeros((5, 5), np.uint8))
    np.save(tmp_path / "nan.npy", np.full((2, 4, 4, 1), np.nan, np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for name, size in (("a.png", 4), ("b.png", 5)):
        Image.new("L", (size, size)).save(tmp_path / "sizes" / name)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/data_batch_1.bin").write_bytes(bytes(5000))
    for text, words in (
        ("absent.npz", "no such file"),
        ("other.npz", "no arr_0, only ['x']"),
        ("flat.npy", "got [5, 5]"),
        ("nan.npy", "2 of 2 samples hold NaN"),
        ("objects.npy", "objects.npy: it holds Python objects"),
        ("text.npz", "text.npz is damaged or no zip archive"),
        ("text.safetensors", "text.safetensors is damaged or no .safetensors file"),
        ("empty", "neither pictures nor parts"),
        ("sizes", "b.png is (1, 5, 5)"),
        ("torn", "5000 bytes, not a multiple"),
        ("empty:train", "neither MNIST's IDX"),
        ("flat.npy:test", "a split is for folders"),
        ("other.npz/", "other.npz"),
    ):
        with pytest.raises((ValueError, OSError)) as caught:
            open_images(f"{tmp_path}/{text}").all()
        assert words in str(caught.value)
