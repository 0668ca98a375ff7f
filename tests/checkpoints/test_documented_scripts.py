"""The scripts of docs/checkpoints.md run as they stand, on small files of each family, and are five lines at most."""

import re
from pathlib import Path

import pytest
import torch

from sgm_engine.models.adm import ADMUNet
from sgm_engine.models.edm_unet import SongUNet
from tests.family_files import (
    TINY_EDM2,
    diffusers_folder,
    edm2_network,
    edm2_pickle,
    edm_pickle,
    lucidrains_file,
    score_sde_files,
)

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
SCRIPTS = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
SMALL = {
    "img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 16, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip


def write(script, folder):
    if "checkpoint_7" in script:
        score_sde_files(folder, "score_sde_ddpmpp_vp_32")
    elif "edm2" in script:
        edm2_pickle(folder / "edm2-img64.pkl", edm2_network(), TINY_EDM2)
    elif ".pkl" in script:
        edm_pickle(folder / "network-snapshot.pkl", SongUNet(**SMALL).eval(), SMALL)
    elif "ema_0.9999" in script:
        network = ADMUNet(32, 32, 1, [1, 1], [16], num_classes=1000, use_scale_shift_norm=False)
        torch.save(network.state_dict(), folder / "ema_0.9999_050000.pt")
    elif "model-9" in script:
        lucidrains_file(folder / "model-9.pt")
    else:
        diffusers_folder(folder / "pipe")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: re.search(r"load_checkpoint\(\"(.*?)\"", script)[1])
def test_script(script, tmp_path, monkeypatch):
    assert len(script.strip().splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    write(script, tmp_path)
    names = {}
    exec(compile(script, str(DOCS), "exec"), names)
    x = names["x"]
    assert x.shape[:2] == (2, 3) and x.isfinite().all() and not torch.equal(x[0], x[1])


def test_there_is_a_script_for_every_family():
    assert len(SCRIPTS) == 6
