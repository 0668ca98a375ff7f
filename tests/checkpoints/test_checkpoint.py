"""Good checkpoints load, whatever their layout, and survive save, load and convert."""

import hashlib
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgm_engine.checkpoints.checkpoint import CheckpointError, convert, load_checkpoint, read_config, save_checkpoint
from sgm_engine.checkpoints.torch_file import StoredTensor, TorchFile
from sgm_engine.models import NCSN, ModelConfig, NCSNv2, NCSNv2Deeper

DATA = Path(__file__).parents[1] / "data"

V2_CONFIG = """\
!!python/object:argparse.Namespace
data: !!python/object:argparse.Namespace
  channels: 3
  dataset: CIFAR10
  image_size: 32
  logit_transform: false
  random_flip: true
  rescaled: false
model: !!python/object:argparse.Namespace
  ema: true
  ema_rate: 0.999
  ngf: 8
  nonlinearity: elu
  normalization: InstanceNorm++
  num_classes: 232
  sigma_begin: 50
  sigma_dist: geometric
  sigma_end: 0.01
  spec_norm: false
optim: !!python/object:argparse.Namespace
  beta1: 0.9
  lr: 2e-5
sampling: !!python/object:argparse.Namespace
  denoise: true
  n_steps_each: 5
  step_lr: 6.2e-6
"""


@pytest.fixture
def config_yml(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(V2_CONFIG)
    return path


def state_of(version, prefix):
    """The golden weights of NCSN (1) or NCSNv2 (2) and what follows them in a file, with or without ``module.``."""
    name = {1: "golden_ncsn_32_ngf8.pth", 2: "golden_ncsnv2_32_ngf8.pth"}[version]
    content = torch.load(DATA / name, weights_only=True)
    state = {k.removeprefix("module."): v for k, v in content[0].items()}
    return state, [{prefix + k: v for k, v in state.items()}, *content[1:]]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("version", [1, 2])
def test_original_layouts(tmp_path, version, prefix, zipped):
    state, content = state_of(version, prefix)
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_checkpoint(tmp_path / "c.pth", ema=False)
        averaged = load_checkpoint(tmp_path / "c.pth")
    assert type(model) is {1: NCSN, 2: NCSNv2}[version] and not model.training
    assert model.shape == (3, 32, 32) and model.ngf == 8
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name
    if version == 2:  # the file's average is half the weights, and leaves sigmas out
        assert torch.equal(averaged.begin_conv.weight, state["begin_conv.weight"] / 2)
        assert torch.equal(averaged.sigmas, state["sigmas"])
        assert dict(model.plan) == {"steps_per_level": 5, "step_lr": 6.2e-6, "denoise": True}


@pytest.mark.parametrize("name", ["golden_ncsn_32_ngf8.pth", "golden_ncsnv2_32_ngf8.pth"])
def test_our_reader_finds_what_torch_finds(name):
    expected = torch.load(DATA / name, weights_only=True)

    def same(ours, theirs):
        if isinstance(ours, StoredTensor):
            read = file.read(ours)
            assert read.dtype == theirs.dtype and torch.equal(read, theirs)
        elif isinstance(ours, dict):
            assert list(ours) == list(theirs)
            for key in ours:
                same(ours[key], theirs[key])
        elif isinstance(ours, (list, tuple)):
            assert type(ours) is type(theirs) and len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                same(a, b)
        else:
            assert ours == theirs and type(ours) is type(theirs)

    with TorchFile(DATA / name) as file:
        same(file.content, expected)


@pytest.mark.parametrize("length", [0x8080, 0x24B50])
def test_a_header_whose_length_begins_like_a_pth(tmp_path, tiny_weights, length):
    """One safetensors file in 32 begins with 0x80, the first byte of a pickle; 0x50 0x4B is "PK", that of a zip."""
    content = tiny_weights.read_bytes()
    own = int.from_bytes(content[:8], "little")
    assert own < length  # safetensors pads its headers with spaces
    content = length.to_bytes(8, "little") + content[8 : 8 + own].ljust(length) + content[8 + own :]
    (tmp_path / "w.safetensors").write_bytes(content)
    assert load_checkpoint(tmp_path / "w.safetensors").sigmas.tolist() == load_checkpoint(tiny_weights).sigmas.tolist()


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_view_and_scalar(tmp_path, zipped):
    base = torch.arange(24.0).reshape(2, 3, 4)
    content = {
        "transposed": base.permute(2, 0, 1),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "slice": base[1:, ::2],
        "parameter": torch.nn.Parameter(torch.rand(3)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        **{
            str(d): torch.tensor([1, 0, 1]).to(d)
            for d in (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
                torch.uint8,
                torch.bool,
            )
        },
        "others": [
            None,
            True,
            7,
            -3,
            2**40,
            70_000,
            2.5,
            "text",
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, 4),
            (),
            [],
            {},
            torch.Size([2]),
        ],
    }
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    with TorchFile(tmp_path / "c.pt") as file:
        assert file.content["others"] == content["others"]
        for name, value in content.items():
            if name != "others":
                read = file.read(file.content[name])
                assert torch.equal(read, value) and read.dtype == value.dtype and read.shape == value.shape, name


def test_a_plain_state_dict_and_a_trainers_dictionary(tmp_path):
    state, _ = state_of(2, "")
    torch.save(torch.nn.Module.state_dict(NCSNv2(state["sigmas"], 3, 8)) | state, tmp_path / "plain.pt")
    assert torch.equal(load_checkpoint(tmp_path / "plain.pt").end_conv.bias, state["end_conv.bias"])
    ema = {k: v / 4 for k, v in state.items() if k != "sigmas"}
    torch.save({"model": state, "ema": ema, "step": 3}, tmp_path / "trainer.pt")
    assert torch.equal(load_checkpoint(tmp_path / "trainer.pt").end_conv.bias, state["end_conv.bias"] / 4)
    save_file(state, tmp_path / "plain.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "plain.safetensors").end_conv.bias, state["end_conv.bias"])


def test_half_precision_files_become_float32(tmp_path):
    state, _ = state_of(2, "")
    half = {k: v if k == "sigmas" else v.half() for k, v in state.items()}
    torch.save(half, tmp_path / "half.pt")
    model = load_checkpoint(tmp_path / "half.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.begin_conv.weight, state["begin_conv.weight"].half().float())


def test_config_yml(tmp_path, config_yml):
    fields = read_config(config_yml)
    assert fields["plan"] == {"steps_per_level": 5, "step_lr": 6.2e-6, "denoise": True}  # 6.2e-6 is a string in YAML
    assert torch.equal(torch.tensor(fields["sigmas"]), load_checkpoint(DATA / "golden_ncsnv2_32_ngf8.pth").sigmas)
    model = load_checkpoint(DATA / "golden_ncsnv2_32_ngf8.pth", config_yml)
    assert dict(model.plan) == fields["plan"] and model.shape == (3, 32, 32)


def test_what_the_file_does_not_say(tmp_path, config_yml):
    path = DATA / "golden_ncsn_32_ngf8.pth"
    with pytest.warns(UserWarning, match="assuming the published noise levels of NCSN, σ 1 → 0.01 in 10"):
        model = load_checkpoint(path)
    torch.testing.assert_close(model.sigmas, torch.logspace(0, -2, 10), rtol=1e-6, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_checkpoint(path, sigmas=torch.logspace(1, -2, 10), image_size=64)
    assert model.shape == (3, 64, 64) and model.sigmas[0] == 10 and model.plan is None
    config = ModelConfig("NCSN", 3, 48, 8, tuple(torch.logspace(0, -2, 10).tolist()), divide_by_sigma=True)
    assert load_checkpoint(path, config).divide_by_sigma
    with pytest.raises(CheckpointError, match="has ngf 8, but the config says 16"):
        config_yml.write_text(V2_CONFIG.replace("ngf: 8", "ngf: 16"))
        load_checkpoint(path, config_yml)


def test_ema_is_what_was_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        load_checkpoint(DATA / "golden_ncsn_32_ngf8.pth", ema=True)
    weight = load_checkpoint(DATA / "golden_ncsnv2_32_ngf8.pth", ema=True).begin_conv.weight
    assert torch.equal(2 * weight, load_checkpoint(DATA / "golden_ncsnv2_32_ngf8.pth", ema=False).begin_conv.weight)


def test_full_size_round_trip(tmp_path):
    """A published-size v1 list → load → save → load → convert: every value, and the configuration, unchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = NCSN(torch.logspace(0, -2, 10), channels=3, ngf=128, image_size=32)
    state = {"module." + k: v for k, v in original.state_dict().items()}
    torch.save([state, {"state": {}, "param_groups": [{"lr": 1e-3}]}], tmp_path / "v1.pth")
    del original
    with pytest.warns(UserWarning, match="published"):
        model = load_checkpoint(tmp_path / "v1.pth")
    save_checkpoint(model, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="published"):
        config = convert(tmp_path / "v1.pth", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load_checkpoint(tmp_path / "b.safetensors")
    assert again.config == config == model.config and sum(p.numel() for p in again.parameters()) == 30_117_635
    for name, value in again.state_dict().items():
        assert torch.equal(value, state["module." + name]), name


def test_sha256(tmp_path):
    path = DATA / "golden_ncsnv2_32_ngf8.pth"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    load_checkpoint(path, sha256=digest.upper())
    with pytest.raises(CheckpointError, match="expected 000"):
        load_checkpoint(path, sha256="0" * 64)


def test_weights_are_ours_alone(tmp_path):
    """The file may be overwritten in place afterwards."""
    save_checkpoint(NCSNv2([1.0, 0.5], 1, 2), tmp_path / "c.safetensors")
    model = load_checkpoint(tmp_path / "c.safetensors")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with open(tmp_path / "c.safetensors", "r+b") as file:
        file.write(b"\xff" * os.path.getsize(tmp_path / "c.safetensors"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_half_written(tmp_path, monkeypatch):
    target = tmp_path / "c.safetensors"
    target.write_bytes(b"old")
    model = NCSNv2Deeper([1.0, 0.5], 1, 2, image_size=8)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(model, target)
    assert os.listdir(tmp_path) == ["c.safetensors"] and target.read_bytes() == b"old"
    with torch.no_grad():
        model.end_conv.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"end_conv\.bias holds NaN"):
        save_checkpoint(model, target)
    with pytest.raises(ValueError, match=r"target must end in \.safetensors"):
        convert(DATA / "golden_ncsnv2_32_ngf8.pth", tmp_path / "c.pth")


def test_loading_leaves_the_random_generator_alone():
    before = torch.get_rng_state()
    load_checkpoint(DATA / "golden_ncsnv2_32_ngf8.pth")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path):
    model = NCSNv2([1.0, 0.5], 1, 2)
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, .*, got torch\.int8"):
        save_checkpoint(model, tmp_path / "w.safetensors", torch.int8)
    with pytest.raises(TypeError, match="or a CDM, got Conv2d"):
        save_checkpoint(torch.nn.Conv2d(1, 1, 1), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="carries its own config: leave out sigmas, image_size"):
        save_checkpoint(model, tmp_path / "w.safetensors")
        load_checkpoint(tmp_path / "w.safetensors", sigmas=[1.0, 0.4], image_size=64)
