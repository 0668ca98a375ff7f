"""The guides of docs/training.md run as they stand, and what the engine draws are the trained weights' samples."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.models import NCSN

pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")

from tests.training.runs import IMAGES, PLAN, SIGMAS, quiet  # noqa: F401

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
GUIDES = dict(re.findall(r"```python\n# ([\w ]+)([^`]*?\n)```", PAGE))
NEEDS = {"Hugging Face Trainer": "transformers", "accelerate": "accelerate", "peft": "peft"}


@pytest.mark.parametrize("title", GUIDES)
def test_a_guide(title, tmp_path, monkeypatch):
    if title in NEEDS:
        pytest.importorskip(NEEDS[title], reason="pip install 'sgm-engine[trainers]'")
        from accelerate.state import AcceleratorState  # all three import it; one setting a process

        AcceleratorState._reset_state(reset_partial_state=True)
    code = GUIDES[title].partition("\n")[2]
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(body) <= 15
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8)
        untrained = Engine(copy.deepcopy(network).eval(), 4, executor="eager").sample(4, plan=PLAN)
        names = {"torch": torch, "network": network, "images": IMAGES, "plan": PLAN}
        warnings.simplefilter("ignore")  # why the native executor cannot run a network with another forward
        exec(compile(code, title, "exec"), names)
    if "samples" not in names:  # Lightning's writes pictures
        assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["00000002.png", "00000004.png"]
        return
    samples, plain = names["samples"], names["network"]
    vars(plain).pop("forward", None)  # accelerate's, of which the engine runs float32
    want = Engine(copy.deepcopy(plain).eval(), 4, executor="eager").sample(4, plan=PLAN)
    tolerance = 2e-2 if title == "accelerate" else 2e-4
    assert ((samples[-1] - want).norm() / want.norm()) < tolerance
    assert (samples[-1] - untrained).abs().max() > 1e-3


def test_every_trainer_has_a_guide():
    assert list(GUIDES) == ["Lightning", "Hugging Face Trainer", "accelerate", "peft", "A loop of your own"]
