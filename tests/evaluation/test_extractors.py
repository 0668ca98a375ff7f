"""Features: the classifier that is trained, users' extractors, Inception; and the command ``sgm eval``."""

import json
import re
import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from sgm_engine import Engine, load_bundled
from sgm_engine.data.sets import from_array, open_images
from sgm_engine.engine.defaults import few_steps
from sgm_engine.evaluation.classifier import load_classifier, save_classifier, train_classifier
from sgm_engine.evaluation.features import DIGITS, open_extractor
from tests.evaluation.image_files import (
    IMAGES,
    LAST,
    mnist,  # noqa: F401 - fixtures
)


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


def test_the_classifier_trains_on_one_thread(mnist):
    before, seen = torch.get_num_threads(), set()
    try:
        torch.set_num_threads(2)
        train_classifier(open_images(mnist), epochs=1, report=lambda line: seen.add(torch.get_num_threads()))
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_whatever_the_caller_has_switched_on(mnist):
    """Autocast or inference mode around: the same features and the same classifier, to the bit."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28), np.uint8))
    extractor, found = open_extractor("digits"), []
    for switched in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with switched:
            model, _ = train_classifier(open_images(mnist), epochs=1)
            found.append((extractor(images).vectors, model.hidden.weight.detach().clone().numpy()))
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


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


@pytest.fixture
def evaluate(sgm, mnist):
    data = ("--reference", f"{mnist}:test", "--training", f"{mnist}:train", "--replicates", 10)
    return lambda *args: sgm("eval", *args, *data)


def test_eval_measures_files_and_writes_json(evaluate, mnist, tmp_path):
    x = open_images(mnist).all().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", arr_0=x[:15])
    np.savez(tmp_path / "b.npz", arr_0=255 - x[:15])
    done = evaluate("a.npz", "--features", "classifier:c.safetensors", "--json", "r.json", "--against", "b.npz",
        "--copies", "pairs.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {row["metric"]: row for row in report["rows"]}
    assert {"Fréchet distance", "classifier score", "class imbalance", "sliced W1", "mmd", "precision"} < rows.keys()
    assert rows["first minus second"]["value"] < 0 and rows["first minus second"]["value"] == pytest.approx(
        rows["Fréchet distance"]["value"] - rows["Fréchet of --against"]["value"]
    )
    assert " ± " in report["notes"]["classifier score of ten parts"]
    assert report["n"] == 15 and "FID" not in done.stdout and all(name in done.stdout for name in rows)
    assert report["notes"]["distance to the nearest training image"]["samples"]["median"] == 0  # they are copies
    near = report["details"]["nearest training images"]
    assert (
        near["nearest"] == list(range(15))
        and near["distance"] == [0] * 15
        and "nearest training images" not in done.stdout
    )
    above, below = np.split(np.asarray(Image.open(tmp_path / "pairs.png"))[2:], 2)
    np.testing.assert_array_equal(above, below)


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
    (["good.npz", "--metrics", "frechet", "--copies", "x.png"], ["--copies", "copies among --metrics"]),
    (["good.npz", "--metrics", "score"], ["score", "classes"]),
    (["good.npz", "--metrics", "nll", "--nll-images", "0"], ["--nll-images", "at least 1"]),
    (["good.npz", "--nll", "--nll-tolerance", "0"], ["--nll-tolerance", "positive"]),
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


def test_the_bundled_classifier_knows_the_bundled_digits():
    """Without a training set, in no time: what it sees in samples of ten evaluations is digits, of many classes."""
    assert DIGITS.stat().st_size < 2**20
    extractor = open_extractor("digits")
    assert re.search(r"accuracy 0\.98\d\d, sha256 \w{12}", extractor.name)
    model, _ = load_bundled()
    engine = Engine(model, 16)
    x = engine.sample(16, plan=few_steps(engine.sigmas))
    found = extractor(torch.from_numpy(engine.pictures(x)).permute(0, 3, 1, 2))
    shares = torch.from_numpy(found.logits).softmax(1)
    assert found.vectors.shape == (16, 64) and shares.shape == (16, 10)
    assert shares.amax(1).median() > 0.9 and len(shares.argmax(1).unique()) >= 5
