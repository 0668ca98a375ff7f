"""Configurations that must not load: each ends in one clear line, and nothing in it runs."""

import os
from pathlib import Path

import pytest
import torch

from sgm_engine.checkpoints.checkpoint import CheckpointError, load_checkpoint, read_config, save_checkpoint
from tests.checkpoints.bad_configs import CONFIG, YAML
from tests.checkpoints.bad_files import FILES, legacy, model, ours, rezipped, state, zipped


@pytest.mark.parametrize("name", YAML)
def test_bad_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yml"
    path.write_text(YAML[name])
    weights = Path(__file__).parents[1] / "data" / "golden_ncsnv2_32_ngf8.pth"
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(weights, path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert os.listdir(tmp_path) == ["config.yml"], "something ran"
    path.write_text(CONFIG)
    assert read_config(path)["plan"]["step_lr"] == 6.2e-6


@pytest.mark.parametrize("name", ["gadget calls os.system", "deflate bomb", "zip truncated to 0.5", "NaN"])
def test_the_command_says_one_line(name, sgm, tmp_path):
    (tmp_path / "bad.pth").write_bytes(FILES[name])
    done = sgm("convert", "bad.pth", "out.safetensors")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("sgm: bad.pth: "), done.stderr
    assert os.listdir(tmp_path) == ["bad.pth"]


def test_good_files_of_the_same_make_load(tmp_path):
    for content, options in (
        (zipped(state()), {"image_size": 8}),
        (legacy(state()), {"image_size": 8}),
        (ours(), {}),
        (rezipped(lambda entries: None), {"image_size": 8}),
    ):
        (tmp_path / "good").write_bytes(content)
        assert torch.equal(load_checkpoint(tmp_path / "good", **options).end_conv.weight, model().end_conv.weight)
    save_checkpoint(model(), tmp_path / "good")
