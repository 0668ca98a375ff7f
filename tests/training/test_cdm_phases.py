"""The two phases of a classifier of potentials under the trainer: one schedule, one set of weights, one command."""

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]: pip install 'sgm-engine[train]'")

from sgm_engine import load_checkpoint
from sgm_engine.training.cdm_objective import ddm
from sgm_engine.training.config import TrainConfig
from sgm_engine.training.module import ScoreModule
from tests.cdm.potentials import digits, potential

CONFIG = """
architecture: CDM
objective: cdm
ngf: 8
levels: 12
network:
  multipliers: [1, 2]
  blocks: 1
  potentials: 3
  mixing: [4, 8]
  schedule: vp_geometric
  schedule_options: {sigma_max: 10.0, sigma_min: 0.05}
  focus: [0.1, 3.0, 0.5]
direct_steps: 3
steps: 6
batch: 4
lr: 1e-3
log_every: 1
sample_every: 6
save_every: 1
plan: {name: ancestral, start_shift: 0.5, eta: 2.0}
"""


@pytest.fixture
def workplace(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", digits(120, seed=split == "test"))
    return tmp_path


def test_both_phases_resume_and_sample(workplace, sgm):
    """Stopped inside the first phase and gone on: the same bits. The file has base, biases and plan."""
    command = ("train", "--config", "tiny.yaml", "--data", ".", "--accelerator", "cpu", "--out")
    assert sgm(*command, "run").returncode == 0
    model = load_checkpoint(workplace / "run/model.safetensors")
    assert model.plan["eta"] == 2.0 and model.config.focus == (0.1, 3.0, 0.5)
    assert not torch.equal(model.classifier.features.base.mean, torch.zeros(64))
    assert model.classifier.head.bias.abs().max() > 0.1  # as fitted: six steps move them less
    assert sgm(*command, "half", "--set", "steps=4").returncode == 0
    (workplace / "half/checkpoints/00000004.ckpt").unlink()
    resumed = sgm(*command, "half")
    assert "resumed at step 3" in resumed.stdout, resumed.stdout
    again = load_checkpoint(workplace / "half/model.safetensors")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    drawn = sgm("sample", "--checkpoint", "run/model.safetensors", "--n", 4, "--batch", 4, "--out", "x.npz")
    assert drawn.returncode == 0 and "12 NFE a sample" in drawn.stdout
    scored = sgm("eval", "x.npz", "--nll", "--checkpoint", "run/model.safetensors", "--reference", "test.npy")
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout.count("bits per dimension") == 2


def test_a_resumed_run_may_lengthen_its_first_phase(workplace, sgm, monkeypatch):
    command, phases = ("train", "--config", "tiny.yaml", "--data", ".", "--accelerator", "cpu", "--out", "run"), []
    step = ScoreModule.training_step

    def seen(module, *args):
        phases.append(module._objective() is ddm)
        return step(module, *args)

    monkeypatch.setattr(ScoreModule, "training_step", seen)
    assert sgm(*command, "--set", "steps=4").returncode == 0
    assert sgm(*command, "--set", "direct_steps=5").returncode == 0
    assert phases == [True, True, True, False, True, False]


def test_each_phase_has_its_rise_and_its_fall():
    module = ScoreModule(torch.nn.Linear(1, 1), "cdm", warmup=2, decay=0.5, steps=30, direct_steps=10)
    rates = [module.learning_rate(step) for step in range(30)]
    assert rates[:6] == [0.5, 1, 1, 1, 1, 1] and rates[9] == pytest.approx(0.2)
    assert rates[10:21] == [0.5, *[1] * 10] and rates[29] == pytest.approx(0.1)
    plain = ScoreModule(torch.nn.Linear(1, 1), "cdm", warmup=2, decay=0.5, steps=20)
    assert [plain.learning_rate(step) for step in range(20)] == rates[10:]


def test_the_classes_of_a_step_follow_the_prior():
    model = potential(focus=(0.3, 3.0, 0.25))
    seen = []
    module = ScoreModule(model, lambda network, x, levels, key: seen.append(levels) or x.sum())
    module.loss(torch.zeros(4000, 1, 8, 8), torch.arange(4000))
    counts = torch.bincount(seen[0], minlength=14) / 4000
    assert (counts - torch.tensor(model.prior)).abs().max() < 0.02


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"direct_steps": 6}, "direct_steps must be below steps = 6, got 6"),
        ({"direct_steps": -1}, "direct_steps must be at least 0"),
        ({"network": {"schedule": "ddpm", "multipliers": [1], "blocks": 1}}, "0 for a network without potentials"),
    ],
)
def test_bad_phases_are_named(workplace, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(workplace / "tiny.yaml", changes)
