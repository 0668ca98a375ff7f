"""Every example runs as it stands, in under 15 lines, and its pictures are pictures."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import stand_ins

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "with_diffusers": lambda: pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'"),
    "with_azula": lambda: pytest.importorskip("azula", reason="pip install --no-deps azula, and einops"),
    "with_deepinv": stand_ins.deepinv,
}


@pytest.mark.parametrize(
    "name", ["service", "with_k_diffusion", "with_diffusers", "with_edm", "with_azula", "with_deepinv"]
)
def test_example(name, tmp_path, monkeypatch, capsys):
    NEEDS.get(name, lambda: None)()
    monkeypatch.chdir(tmp_path)
    source = (EXAMPLES / f"{name}.py").read_text()
    code = [line for line in source.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) < 15, f"{name}.py has {len(code)} lines"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / f"{name}.py"))
    pictures, printed = list(tmp_path.glob("*.png")), capsys.readouterr().out
    assert pictures or printed
    for picture in pictures:
        pixels = np.asarray(Image.open(picture)) / 255
        assert pixels.std() > 0.05, "an empty picture"
    if name == "with_deepinv":
        measured, restored = (float(word) for word in printed.split() if word.replace(".", "").isdigit())
        assert restored > measured + 1
