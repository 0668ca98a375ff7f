"""What the evaluation reads: sets of images, the classifier that it trains, users' extractors; and the command."""

import gzip
import json
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from sgm_engine.data.sets import from_array, open_images
from sgm_engine.evaluation.classifier import load_classifier, save_classifier, train_classifier
from sgm_engine.evaluation.features import open_extractor
from sgm_engine.outputs.output import Output

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 3, 6, 5), dtype=np.uint8)
LAST = IMAGES.transpose(0, 2, 3, 1)


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(
        gzip.compress(header + array.tobytes(), mtime=0) if path.suffix == ".gz" else header + array.tobytes()
    )


def write_mnist(folder, n=40, side=8, seed=0):
    """Bright top or bright bottom: two classes that a small network learns at once."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for split, count in (("train", n), ("t10k", n // 2)):
        labels = (np.arange(count) % 2).astype(np.uint8)
        x = rng.integers(0, 100, (count, side, side), dtype=np.uint8)
        for image, label in zip(x, labels, strict=True):
            image[: side // 2 if label else side] += 100
            image[: 0 if label else side // 2] -= 100
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", x)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture
def mnist(tmp_path):
    return write_mnist(tmp_path / "mnist")


# -- images ------------------------------------------------------------------------------------------------------------


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


# -- the classifier and other extractors -------------------------------------------------------------------------------


def test_the_classifier_learns_repeats_and_leaves_the_global_generator_alone(mnist, tmp_path):
    images, state = open_images(mnist), torch.get_rng_state()
    models = [train_classifier(images, seed, epochs=8) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model, _ in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert models[0][1] == 1.0
    save_classifier(models[0][0], tmp_path / "c.safetensors", {"accuracy": 1.0})
    loaded, about = load_classifier(tmp_path / "c.safetensors")
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), models[0][0](x), strict=True)) and about == {
        "accuracy": 1.0
    }
    assert loaded(x)[0].shape == (3, 64) and loaded(x)[1].shape == (3, 2)


def test_the_classifier_is_made_once_and_kept(mnist, tmp_path):
    file, said = tmp_path / "c.safetensors", []
    first = open_extractor(f"classifier:{file}", open_images(mnist), said.append)
    made = file.read_bytes()
    second = open_extractor(f"classifier:{file}")
    assert file.read_bytes() == made and first.name == second.name and any("training" in line for line in said)
    block = next(open_images(f"{mnist}:test").blocks())
    assert np.array_equal(first(block).vectors, second(block).vectors) and first(block).logits.shape == (20, 2)
    with pytest.raises(ValueError, match=r"takes images \(1, 8, 8\), got \(3, 6, 5\)"):
        first(torch.from_numpy(IMAGES))


def test_classifiers_that_cannot_be_had(mnist, tmp_path, tiny_weights):
    with pytest.raises(FileNotFoundError, match="pass labelled training images"):
        open_extractor(f"classifier:{tmp_path}/new.safetensors")
    with pytest.raises(ValueError, match="array has no labels"):
        open_extractor(f"classifier:{tmp_path}/new.safetensors", from_array(IMAGES), print)
    with pytest.raises(ValueError, match="holds no classifier of this version"):
        open_extractor(f"classifier:{tiny_weights}")
    (tmp_path / "bad.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is damaged"):
        open_extractor(f"classifier:{tmp_path}/bad.safetensors")


class Two(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x[:, :, 0, 0] * 2


class One(torch.nn.Module):
    def forward(self, x):
        return x.amax((2, 3))


def test_users_modules_are_extractors(tmp_path):
    block = torch.from_numpy(IMAGES)
    torch.jit.script(Two()).save(tmp_path / "two.pt")
    found = open_extractor(f"torchscript:{tmp_path}/two.pt", trust=True)(block)
    np.testing.assert_allclose(found.vectors, IMAGES.mean((2, 3)) / 255, rtol=1e-6)
    np.testing.assert_allclose(found.logits, IMAGES[:, :, 0, 0] / 255 * 2, rtol=1e-6)
    batch = torch.export.Dim("batch")
    program = torch.export.export(One(), (torch.rand(3, 3, 6, 5),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "one.pt2")
    found = open_extractor(f"export:{tmp_path}/one.pt2", trust=True)(block)
    np.testing.assert_allclose(found.vectors, IMAGES.max((2, 3)) / 255, rtol=1e-6)
    assert found.logits is None
    for kind, file in (("torchscript", "one.pt2"), ("export", "two.pt")):
        (tmp_path / "bad").write_bytes(b"garbage")
        with pytest.raises(ValueError, match="is no"):
            open_extractor(f"{kind}:{tmp_path}/bad", trust=True)
        assert file


def test_inception_is_asked_as_torch_fidelity_wants_it(tmp_path, monkeypatch):
    """A stand-in of torch-fidelity's class: weights are a download, which no test makes."""
    asked = {}

    class StandIn:
        def __init__(self, name, features_list, feature_extractor_weights_path):
            asked.update(name=name, features=features_list, path=feature_extractor_weights_path)

        def __call__(self, x):
            asked["dtype"] = x.dtype
            return torch.zeros(len(x), 2048), torch.zeros(len(x), 1008)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "w.pth").write_bytes(b"weights")
    extractor = open_extractor(f"inception:{tmp_path}/w.pth", trust=True)
    found = extractor(torch.from_numpy(IMAGES))
    assert extractor.inception and found.vectors.shape == (11, 2048) and found.logits.shape == (11, 1008)
    assert asked == {"name": "inception-v3-compat", "features": ["2048", "logits_unbiased"],
        "path": f"{tmp_path}/w.pth", "dtype": torch.uint8}  # fmt: skip
    with pytest.raises(ValueError, match=r"RGB images, these have 1"):
        extractor(torch.from_numpy(IMAGES[:, :1]))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(sgm, mnist):
    data = ("--reference", f"{mnist}:test", "--training", f"{mnist}:train", "--replicates", 10)
    return lambda *args: sgm("eval", *args, *data)


def test_eval_measures_files_and_writes_json(evaluate, mnist, tmp_path):
    x = open_images(mnist).all().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=x[:15])
    np.savez(tmp_path / "b.npz", arr_0=255 - x[:15])
    done = evaluate("a.npz", "--features", "classifier:c.safetensors", "--json", "r.json", "--against", "b.npz")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {row["metric"]: row for row in report["rows"]}
    assert {"Fréchet distance", "classifier score", "class imbalance", "sliced W1", "mmd", "precision"} < rows.keys()
    assert rows["first minus second"]["value"] < 0 and rows["first minus second"]["value"] == pytest.approx(
        rows["Fréchet distance"]["value"] - rows["Fréchet of --against"]["value"]
    )
    assert report["n"] == 15 and "FID" not in done.stdout and all(name in done.stdout for name in rows)
    assert report["notes"]["distance to the nearest training image"]["samples"]["median"] == 0  # they are copies


def test_eval_draws_its_own_samples(evaluate, tiny_weights, tmp_path):
    draw = ("--checkpoint", tiny_weights, "--batch", 4, "--n", 10, "--metrics", "frechet,precision", "--neighbours", 2)
    done = evaluate(*draw, "--json", "r.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["metric"] for row in report["rows"]] == ["Fréchet distance", "precision"]
    assert report["samples"] == "annealed_langevin, 7 NFE, seed 0" and report["n"] == 10


BAD = [
    (["absent.npz"], ["absent.npz"]),
    (["wrong.npz"], ["one shape", "(3, 6, 5)"]),
    (["good.npz", "--metrics", "beauty"], ["metrics", "beauty"]),
    (["good.npz", "--metrics", "score"], ["score", "classes"]),
    (["good.npz", "--metrics", "nll"], ["nll", "log_prob"]),
    (["good.npz", "--features", "magic"], ["features", "'magic'", "pixels"]),
    (["good.npz", "--features", "inception:absent.pth"], ["absent.pth"]),
    (["good.npz", "--json", "no/where.json"], ["no/where.json"]),
    (["good.npz", "--json", "."], ["is a folder"]),
    (["good.npz", "--against", ""], ["--against", "empty"]),
    (["good.npz", "--neighbours", "0"], ["--neighbours"]),
    (["good.npz", "--neighbours", "14"], ["k must be", "14"]),
    (["--n", "1"], ["--n", "at least 2"]),
    (["--n", "4", "--plan", "magic"], ["plan", "'magic'"]),
    (["--n", "4", "--plan", "absent.json"], ["absent.json"]),
    (["--n", "4", "--plan", "good.json"], ["not a plan"]),
]


@pytest.mark.parametrize("args, words", BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_line(args, words, evaluate, mnist, tmp_path):
    np.savez(tmp_path / "good.npz", arr_0=open_images(mnist).all()[:14].permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "wrong.npz", arr_0=LAST)
    (tmp_path / "good.json").write_text("{}")
    done = evaluate(*args)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "r.json").exists()
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("sgm: ")
    for word in words:
        assert word in done.stderr
