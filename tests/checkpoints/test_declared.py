"""What a small file declares is compared with what it holds before anything is built: soon, and in little memory."""

import io
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sgm_engine.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sgm_engine.checkpoints.torch_file import TorchFile
from sgm_engine.checkpoints.torch_program import MAX_OPCODES
from sgm_engine.evaluation.classifier import FORMAT, Classifier, load_classifier, save_classifier
from sgm_engine.evaluation.features import open_extractor
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.plans.plan import Plan, annealed_langevin
from sgm_engine.rewriting.float8.config import Float8Config
from sgm_engine.training.config import TrainConfig
from tests.checkpoints.bad_files import zipped

DATA = Path(__file__).parents[1] / "data" / "hostile"


def soon(error: type, words: str, function, *args):
    """``function(*args)`` raises error, one line with these words, within 2 seconds of this process's time."""
    start = time.process_time()
    with pytest.raises(error, match=words) as caught:
        function(*args)
    assert time.process_time() - start < 2 and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name, words",
    [
        ("cdm_blocks_100000.safetensors", "blocks, multipliers and width must make at most"),
        ("cdm_width_overflow.safetensors", "blocks, multipliers and width must make at most"),
        ("pth_dag_tuple_key.pth", "has a tuple as a key"),
        ("pth_legacy_keys_dag.pth", "lists other storages"),
    ],
)
def test_small_checkpoints(name, words):
    soon(CheckpointError, words, load_checkpoint, DATA / name)


def test_a_network_larger_than_its_file(tmp_path):
    config = CDMConfig(1, 8, 4, [1] * 9, 100, "ddpm", 4)
    metadata = {"format": "sgm-engine", "format_version": "1", "config": config.to_json()}
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.zeros(1)}, metadata))
    words = "describes a network of more than 1800 tensors, and holds 1"
    soon(CheckpointError, words, load_checkpoint, tmp_path / "x.safetensors")


def test_a_small_classifier(tmp_path):
    small = DATA / "classifier_classes_25e6.safetensors"
    soon(ValueError, "no classifier has shape and classes", load_classifier, small)
    many, wide = '{"shape": [1, 8, 8], "classes": 1000000}', '{"shape": [900000, 8, 8], "classes": 3}'
    for config in (many, wide, "[]", "[" * 9999):
        metadata = {"format": FORMAT, "config": config, "about": '{"accuracy": 1}'}
        (tmp_path / "k").write_bytes(save({"a": torch.zeros(1)}, metadata))
        soon(ValueError, "k is damaged", load_classifier, tmp_path / "k")
    model = Classifier((1, 8, 8), 3)
    save_classifier(model, tmp_path / "k", {"accuracy": 0.5})
    loaded, about = load_classifier(tmp_path / "k")
    assert about["accuracy"] == 0.5
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)


def program(body: bytes) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + body + b"."


NESTED = b")" + b"\x85" * 100_000  # ((…(),),)


@pytest.mark.parametrize(
    "body, words",
    [
        (b"}" + NESTED + b"Ns", "has a tuple as a key"),  # {nested: None}
        (b"}(" + NESTED + b"Nu", "has a tuple as a key"),
        (b"ccollections\nOrderedDict\n(]" + NESTED + b"N\x86atR", "has a tuple as a key"),
        # a list of 1,000 pairs, made a dict 2,000 times
        (b"](" + b"K\x01N\x86" * 1000 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 2000, "more steps"),
    ],
    ids=["SETITEM", "SETITEMS", "OrderedDict", "the same list again"],
)
def test_programs_that_take_time(tmp_path, body, words):
    assert MAX_OPCODES < 2000 * 1000
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program(body))
    (tmp_path / "x.pth").write_bytes(file.getvalue())
    soon(CheckpointError, words, TorchFile, tmp_path / "x.pth")


def test_a_version_that_is_no_number(tmp_path):
    """The text of tuples that share their halves has no end; it is not made."""
    shared = b"()q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"t"
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    (tmp_path / "x.pth").write_bytes(magic + program(shared))
    soon(CheckpointError, "has version", TorchFile, tmp_path / "x.pth")


def test_dimensions_are_few(tmp_path):
    tensor = torch.zeros([1] * 9)
    (tmp_path / "x.pth").write_bytes(zipped({"a": tensor}))
    soon(CheckpointError, "describes a tensor in a way that torch.save does not", TorchFile, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(zipped({"a": tensor[0]}))
    with TorchFile(tmp_path / "x.pth") as file:
        assert file.content["a"].shape == (1,) * 8


@pytest.mark.parametrize("offset", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_zip_whose_directory_lies_elsewhere(tmp_path, offset):
    """OSError EINVAL of a seek to before the beginning, among others."""
    content = bytearray(zipped({"a": torch.zeros(1)}))
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 20] = struct.pack("<II", min(offset, 2**32 - 1), min(offset, 2**32 - 1))
    (tmp_path / "x.pth").write_bytes(content)
    soon(CheckpointError, "", load_checkpoint, tmp_path / "x.pth")


def test_levels_without_end(tmp_path):
    words = "levels must be between 1 and 100000, got 600000000"
    soon(ValueError, words, TrainConfig.read, "mnist_tiny", {"levels": 600_000_000})
    (tmp_path / "x.yaml").write_text("architecture: [" + "[" * 50_000)
    soon(ValueError, "nests too deep", TrainConfig.read, tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["plan_a_1e200.json", "plan_metadata_list.json"])
def test_plans_that_ended_in_a_traceback(name):
    words = "a must be finite in float32|metadata must be an object"
    soon(ValueError, words, Plan.from_json, (DATA / name).read_text())


def test_what_a_plan_says_can_be_shown(sgm, tmp_path):
    soon(ValueError, "nests too deep", Plan.from_json, "[" * 100_000)
    soon(ValueError, "nests too deep", Float8Config.from_json, "[" * 100_000)
    text = annealed_langevin([1.0, 0.5], 1, 1e-5).to_json()
    named = text.replace("annealed_langevin", "\\u001b[2J")
    soon(ValueError, "name must be at most 200 characters", Plan.from_json, named)
    (tmp_path / "p.json").write_text(text.replace('"convention": "code"', '"convention": "\\u001b[2J"'))
    said = sgm("sample", "--n", "1", "--batch", "1", "--plan", "p.json", "--conditioning", "nearest", "--out", "x.npz")
    assert said.returncode == 0 and "\x1b" not in said.stdout and "\\x1b[2J" in said.stdout


@pytest.mark.parametrize("kind", ["export", "torchscript", "inception"])
def test_what_runs_a_files_content_asks_first(tmp_path, kind, sgm):
    """torch.export's and torch-fidelity's files are pickles: one that runs a program when it is opened."""

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "x.pt2").write_bytes(zipped({"a": Payload()}))
    with pytest.raises(ValueError, match="can run any program when it is opened: pass --trust-features"):
        open_extractor(f"{kind}:{tmp_path}/x.pt2")
    assert not (tmp_path / "ran").exists()


def test_a_classifier_that_holds_nan(tmp_path):
    model = Classifier((1, 8, 8), 3)
    model.out.bias.data[1] = torch.nan
    save_classifier(model, tmp_path / "k", {"accuracy": 0.5})
    soon(ValueError, r"k is damaged: it holds NaN or Inf in out\.bias", load_classifier, tmp_path / "k")
