"""The comparison on images by one command: paired, resumed, and its figures."""

import numpy as np
import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")

from sgm_engine.data.images import dequantise
from sgm_engine.keys import Key
from sgm_engine.training import compare_images
from sgm_engine.training.config import TrainConfig
from tests.training.test_training_data import idx

RNG = np.random.default_rng(0)


class Shrinking(torch.nn.Module):
    """s = −x̃/σ², whose loss is ½‖x‖²/σ² whatever the noise."""

    sigmas = torch.tensor([2.0, 0.5])

    def forward(self, x, level):
        return -x / self.sigmas[level].view(-1, 1, 1, 1) ** 2


def test_held_out_losses():
    images = RNG.integers(0, 256, (5, 1, 4, 4), dtype=np.uint8)
    x = torch.from_numpy(images)
    x = dequantise(x, Key(0, torch.arange(5)).uniform(x.float())).double()
    expected = 0.5 * x.square().flatten(1).sum(1)[:, None] / Shrinking.sigmas**2
    torch.testing.assert_close(compare_images.held_out_losses(Shrinking(), images), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of IDX files, and networks that train in a moment."""
    for split, n in (("train", 240), ("t10k", 40)):
        images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        labels = np.array([n], ">u4").tobytes() + (np.arange(n) % 10).astype(np.uint8).tobytes()
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + labels)
    read = TrainConfig.read
    small = {"ngf": 4, "batch": 8, "levels": 3, "precision": "float32", "sample_every": 0, "log_every": 1}
    monkeypatch.setattr(TrainConfig, "read", lambda name, changes=None: read(name, (changes or {}) | small))
    return tmp_path


def test_one_command_makes_the_table_and_goes_on(folder, capsys):
    command = ["--data", str(folder), "--out", str(folder / "out"), "--n", "40", "--steps"]
    compare_images.main([*command, "2", "--methods", "denoising,multi_sample-2"])
    table = (folder / "out/table.md").read_text()
    denoising, many = (line.split("|")[1:-1] for line in table.splitlines() if line.startswith(("| den", "| multi")))
    assert denoising[0].strip() == "denoising" and not denoising[3].strip()
    base, loss, gap = (float(cell.split()[0]) for cell in (denoising[4], many[4], many[5]))
    assert gap == pytest.approx(loss - base, abs=0.011)
    assert (folder / "out/digits.png").exists()
    rows = (folder / "out/denoising.0/metrics.csv").read_text()
    compare_images.main([*command, "2"])  # two more methods
    again = (folder / "out/table.md").read_text().splitlines()
    assert all(line in again for line in table.splitlines() if line.startswith(("| den", "| multi")))
    assert (folder / "out/denoising.0/metrics.csv").read_text() == rows  # not trained again
    names = [line.split("|")[1].strip() for line in again if line.startswith(("| den", "| st", "| mu"))]
    assert names == list(compare_images.METHODS)


def test_unknown_methods_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_images.main(["--data", str(tmp_path), "--methods", "denoising,edm"])
    assert "must be of denoising, stable_target, multi_sample-2, multi_sample-4, got 'edm'" in capsys.readouterr().err
