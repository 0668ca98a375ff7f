"""``sgm sample --sampler … --nfe …`` and ``--plan FILE.json``: from the arguments to the picture."""

import json

import numpy as np
import pytest
import torch

from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.cli import arguments
from sgm_engine.engine.engine import Engine
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.plans import samplers, schedule
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import karras

pytestmark = pytest.mark.filterwarnings("ignore:more than 1% of these values")  # of random networks
SMALL = ("--n", 3, "--batch", 2, "--quiet")


def drawn(path):
    return torch.from_numpy(np.load(path)["arr_0"])


@pytest.mark.parametrize("conditioning", ["interpolated", "nearest"])
def test_a_sampler_of_few_evaluations(sgm, tiny_weights, tmp_path, conditioning):
    run = sgm("sample", "--checkpoint", tiny_weights, "--sampler", "heun", "--nfe", 9, *SMALL, "--out", "x.npz",
              "--conditioning", conditioning)  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    model = load_checkpoint(tiny_weights)
    plan = samplers.heun(karras(float(model.sigmas[0]), float(model.sigmas[-1]), 5))
    if conditioning == "nearest":
        plan = plan.on_levels(model.sigmas)
    else:
        model = at_sigmas(model, plan.sigmas)
    want = (Engine(model, 2).sample(3, plan=plan).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (drawn(tmp_path / "x.npz").float() - want).abs().max() <= 1


def test_a_saved_plan(sgm, tiny_weights, tmp_path):
    model = load_checkpoint(tiny_weights)
    plan = samplers.dpm_solver_2m(karras(float(model.sigmas[0]), float(model.sigmas[-1]), 4))
    (tmp_path / "p.json").write_text(plan.to_json())
    run = sgm("sample", "--checkpoint", tiny_weights, "--plan", "p.json", *SMALL, "--out", "a.npz")
    assert (run.returncode, run.stderr) == (0, "")
    arguments = ("--sampler", "dpm_solver_2m", "--nfe", 4)
    assert sgm("sample", "--checkpoint", tiny_weights, *arguments, *SMALL, "--out", "b.npz").returncode == 0
    assert torch.equal(drawn(tmp_path / "a.npz"), drawn(tmp_path / "b.npz"))


@pytest.mark.parametrize(
    "given, says",
    [
        (("--sampler", "heun"), "--sampler: needs --nfe"),
        (("--sampler", "heun", "--nfe", 10), "take 9 or 11"),
        (("--sampler", "heun", "--nfe", 9, "--plan", "ddim"), "exclude each other"),
        (("--sampler", "rk45", "--nfe", 9), "--sampler"),
        (("--plan", "p.json", "--nfe", 9), "is complete, --nfe cannot change it"),
        (("--plan", "p.json"), "p.json: plan version 9 is not supported"),
        (("--plan", "none.json"), "none.json"),
        (("--plan", "somewhere"), "or FILE.json, got 'somewhere'"),
    ],
)
def test_what_does_not_go_together(sgm, tiny_weights, tmp_path, given, says):
    plan = json.loads(samplers.heun([1.0, 0.5]).to_json()) | {"version": 9}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    run = sgm("sample", "--checkpoint", tiny_weights, *given, *SMALL, "--out", "x.npz")
    assert run.returncode == 2 and says in run.stderr and len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "x.npz").exists()


def test_what_is_offered_is_what_there_is():
    assert set(arguments.SAMPLERS) < set(samplers.SAMPLERS)
    assert tuple(schedule.SCHEDULES) == arguments.SCHEDULES
    assert all(isinstance(samplers.plan_of_nfe(name, 9, 1, 0.1), Plan) for name in arguments.SAMPLERS)
