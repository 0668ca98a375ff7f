"""Files that must not load: each ends in one clear line, soon, in little memory, and nothing in it runs."""

import hashlib
import os
import pickle
import resource
import sys
import time
from pathlib import Path

import pytest
import torch

from sgm_engine.checkpoints.checkpoint import CheckpointError, load_checkpoint
from sgm_engine.models import NCSNv2
from tests.checkpoints.bad_configs import YAML
from tests.checkpoints.bad_files import CANARY, FILES, bombs, changed, legacy, ours, state, zipped


def refused(load, *args, **kwargs) -> str:
    """The one line of the error; asserts that it came soon and in little memory."""
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load(*args, **kwargs)
    message, path = str(caught.value), Path(args[0])
    size = path.stat().st_size if path.is_file() else 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600, message
    assert "weights_only" not in message and "Traceback" not in message
    assert time.process_time() - began <= 5 and grown <= 2 * size + 500e6
    return message.removeprefix(f"{path}: ")


def test_there_are_enough_of_them():
    assert len(FILES) + len(YAML) >= 160 and len(set(FILES.values())) >= len(FILES) - 2


@pytest.mark.parametrize("name", FILES)
def test_bad_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_bytes(FILES[name])
    message = (
        refused(load_checkpoint, tmp_path / "bad", image_size=8)
        if "ours" not in name
        else refused(load_checkpoint, tmp_path / "bad")
    )
    assert os.listdir(tmp_path) == ["bad"], "something ran"
    for word in WORDS.get(name, ()):
        assert word in message, message


WORDS = {  # what the line must say, where it matters most
    "gadget calls os.system": ["os.system", "nothing was run", "safetensors"],
    "gadget calls os.system beside weights, legacy": ["os.system", "nothing was run"],
    "deflate bomb": ["compressed"],
    "stride 0, 40 GB": ["of no known family"],
    "NaN": ["NaN or Inf in refine2.msf.convs.0.weight", "diverged"],
    "NaN in the average": ["NaN or Inf"],
    "a key missing": ["lacks res3.0.conv1.bias"],
    "a key extra": ["has unknown res9.conv.bias"],
    "a shape wrong": ["end_conv.bias", "[2]", "[1]"],
    "half the keys": ["of no known family", "77 tensors"],
    "a Git LFS pointer": ["git lfs pull"],
    "another network": ["as_score"],
    "ours: string numbers": ["ngf must be an integer", "'2'"],
    "ours: other sigmas": ["other sigmas"],
    "zip truncated to 0.5": ["damaged"],
}


def test_the_gadgets_are_real(tmp_path, monkeypatch):
    """The control: an unpickler that trusts the same bytes does leave the canary behind."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(bombs(CANARY)["calls os.system"])
    assert CANARY.exists()


def test_a_stride_0_tensor_under_a_right_name(tmp_path):
    """It has the right shape, and one stored value for all of it."""
    bad = changed(res1__0__conv1__weight=torch.zeros(1, 1, 1, 1).expand(2, 2, 3, 3))
    for write in (zipped, legacy):
        (tmp_path / "bad").write_bytes(write(bad))
        assert "in 1 stored values" in refused(load_checkpoint, tmp_path / "bad", image_size=8)


def test_one_storage_under_many_names(tmp_path):
    """Every tensor in bounds, but together ten times what the file holds."""
    tensors = NCSNv2([1.0, 0.5], channels=1, ngf=8, image_size=8).state_dict()
    shared = torch.rand(max(v.numel() for v in tensors.values()))
    views = {k: shared[: v.numel()].view(v.shape) for k, v in tensors.items() if k != "sigmas"}
    (tmp_path / "bad").write_bytes(zipped(tensors | views))
    assert "more values than it holds" in refused(load_checkpoint, tmp_path / "bad", image_size=8)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_flipped_bits(kind, tmp_path):
    """With a digest every flip is found; without one, never a crash."""
    good = {"zip": zipped(state()), "legacy": legacy(state()), "safetensors": ours()}[kind]
    digest = hashlib.sha256(good).hexdigest()
    options = {} if kind == "safetensors" else {"image_size": 8}
    (tmp_path / "c").write_bytes(good)
    load_checkpoint(tmp_path / "c", sha256=digest, **options)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(good) * 8, (20,), generator=generator).tolist():
        flipped = bytearray(good)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "c").write_bytes(flipped)
        assert "sha256" in refused(load_checkpoint, tmp_path / "c", sha256=digest, **options)
        try:
            load_checkpoint(tmp_path / "c", **options)
        except CheckpointError as error:
            assert "\n" not in str(error) and "weights_only" not in str(error)


def test_not_files(tmp_path):
    assert "No such file" in refused(load_checkpoint, tmp_path / "none.pth")
    assert "is not a file" in refused(load_checkpoint, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refused(load_checkpoint, tmp_path / "pipe")
    if sys.platform == "linux":
        assert "is not a file" in refused(load_checkpoint, "/dev/zero")
