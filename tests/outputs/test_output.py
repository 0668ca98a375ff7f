"""output.py: every form, complete or not at all."""

import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sgm_engine.outputs import output
from sgm_engine.outputs.output import Output

SAMPLES = torch.rand(5, 1, 4, 6, generator=torch.Generator().manual_seed(0))
IDS = [7, 8, 9, 1_000_000, 3]


def test_the_name_decides_the_form():
    names = ["a.png", "A.PNG", "a.npz", "a.safetensors"]
    assert [Output.parse(name).form for name in names] == ["grid", "grid", "npz", "safetensors"]


def test_folders_are_told_from_files(tmp_path):
    (tmp_path / "run.npz").mkdir()
    folders = ["a", "a.png/", f"{tmp_path}/run.npz"]
    assert [output.is_folder(name) for name in (*folders, "a.png", "a.jpg")] == [True] * 3 + [False] * 2
    for name in folders:
        with pytest.raises(ValueError, match="cannot tell what to write"):
            Output.parse(name)


def test_an_unknown_suffix_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'a\.jpg'.*\.png.*\.npz.*\.safetensors"):
        Output.parse("a.jpg")


def test_npz_is_what_fid_tools_read(tmp_path):
    Output.parse(f"{tmp_path}/s.npz").write(SAMPLES, IDS)
    with np.load(tmp_path / "s.npz") as data:
        assert (data["arr_0"].dtype, data["arr_0"].shape) == (np.uint8, (5, 4, 6, 1))
        assert np.array_equal(data["arr_0"], np.floor(SAMPLES.permute(0, 2, 3, 1).numpy() * 255 + 0.5))
        assert data["sample_id"].tolist() == IDS


def test_safetensors_keeps_every_bit_and_the_notes(tmp_path):
    wild = torch.cat([SAMPLES * 3 - 1, torch.full((1, 1, 4, 6), torch.nan)])
    Output.parse(f"{tmp_path}/s.safetensors").write(wild, [*IDS, 4], {"seed": "11"})
    with safe_open(tmp_path / "s.safetensors", "np") as data:
        assert data.get_tensor("samples").tobytes() == wild.numpy().tobytes()
        assert data.get_tensor("sample_id").tolist() == [*IDS, 4]
        assert data.metadata() == {"seed": "11"}


@pytest.mark.parametrize("name", ["s.png", "s.npz", "s.safetensors"])
def test_the_same_samples_are_the_same_bytes(tmp_path, name):
    contents = []
    for attempt in ("a", "b"):
        (tmp_path / attempt).mkdir()
        Output.parse(f"{tmp_path}/{attempt}/{name}").write(SAMPLES, IDS)
        contents.append([f.read_bytes() for f in sorted((tmp_path / attempt).rglob("*")) if f.is_file()])
    assert contents[0] == contents[1] and contents[0]


@pytest.mark.parametrize("name", ["s.png", "s.npz"])
def test_a_sample_that_is_not_finite_writes_nothing(tmp_path, name):
    samples = SAMPLES.clone()
    samples[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="first at index 2"):
        Output.parse(f"{tmp_path}/{name}").write(samples, IDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["s.png", "s.npz", "s.safetensors"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_while_writing_leaves_what_was_there(tmp_path, name, fault, monkeypatch):
    target = Output.parse(f"{tmp_path}/{name}")
    target.path.write_bytes(b"before")

    def fail(file):  # everything is written by now, and nothing renamed yet
        assert list(tmp_path.glob(".s*.tmp"))
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(fault)):
        target.write(SAMPLES, IDS)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert target.path.read_bytes() == b"before"


def test_check_finds_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("none/s.png", "file/s.png"):
        with pytest.raises(OSError, match="there is no folder"):
            Output.parse(f"{tmp_path}/{name}").check()
    with pytest.raises(OSError, match="cannot write in /proc"):
        Output.parse("/proc/s.png").check()
    Output.parse(f"{tmp_path}/fine.png").check()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file"]


def test_ids_must_match_the_samples(tmp_path):
    with pytest.raises(ValueError, match="5 samples came with 2 sample ids"):
        Output.parse(f"{tmp_path}/s.npz").write(SAMPLES, [1, 2])
