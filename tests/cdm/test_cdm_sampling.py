"""A classifier under the engine: capture, slots, every plan, and samples of the mixture in the right shares."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from sgm_engine import (
    Engine,
    ancestral,
    annealed_langevin,
    ddim,
    dpm_solver_2m,
    heun,
    sde_dpm_solver_2m,
)
from sgm_engine.cdm.ablation import CLASSES, Exact
from sgm_engine.cdm.metropolis import mala
from sgm_engine.models.cdm import classes as schedules
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.networks import UNet
from sgm_engine.training.toy import TRIPLE
from tests.executors.graph_engines import eager_engine, graph_engine

N = 1000


def small(seed=0, levels=6, **options):
    """A random U-Net of 8×8 pixels in float32, ready to sample."""
    classes = schedules.vp_geometric(levels, 10.0, 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet(1, 8, classes, width=8, multipliers=(1, 2), blocks=1, attention=(4,), baseline=(0.0, 1.0), **options)
        nn.init.normal_(net.head.weight, std=0.01)
    return CDM(net, classes, (1, 8, 8), scale=2.0, shift=-1.0).eval()


def shares(x):
    """Share of samples nearest, by the posterior at σ = 0, to each component of the mixture."""
    joint, _ = TRIPLE._joint(x.flatten(1).double(), 0.0)
    return joint.argmax(1).bincount(minlength=3).double() / len(x)


def expected():
    from sgm_engine.keys import Key

    return shares(TRIPLE.sample(Key(123, torch.arange(400_000))))


def test_forward_and_backward_are_captured_together():
    model = small()
    plan = ddim(model.sigmas, start_shift=0.5)
    captured = graph_engine(model)
    torch.testing.assert_close(captured.sample(6, 1, plan), eager_engine(model).sample(6, 1, plan), rtol=0, atol=0)
    assert captured.stats.captures == 1
    with torch.no_grad():
        model.classifier.head.weight.mul_(2)
    torch.testing.assert_close(captured.sample(2, 1, plan), eager_engine(model).sample(2, 1, plan), rtol=0, atol=0)
    assert captured.stats.captures == 1


@torch.no_grad()
def test_every_slot_has_its_own_level():
    model = small()
    x, level = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 0, 2, 5])
    score = model(x, level)
    for i in range(4):
        torch.testing.assert_close(score[i : i + 1], model(x[i : i + 1], level[i : i + 1]), rtol=1e-4, atol=1e-4)
    assert not score.requires_grad and all(p.grad is None for p in model.parameters())


def test_bfloat16_keeps_the_head_in_float32():
    model = small()
    plan = ancestral(model.sigmas, start_shift=0.5)
    wide, half = (Engine(model, 4, precision=p).sample(4, plan=plan) for p in ("float32", "bfloat16"))
    assert 0 < (wide - half).abs().max() < 0.05 * wide.std()


@pytest.mark.parametrize("executor", ["eager", "native"])
def test_thousand_steps_leave_nothing_behind(executor):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to see the memory of this process")
    engine = Engine(small(levels=10), 1, executor=executor)
    short, long = (
        annealed_langevin(engine.sigmas, k, step_lr=1e-4, start="normal", start_scale=5.0) for k in (10, 100)
    )
    engine.sample(1, plan=short)
    before = resident()
    engine.sample(1, plan=long)
    assert long.nfe > 1000 and resident() - before < 2**20


def check_shares(x):
    """Within three standard errors of what data have."""
    found, truth = shares(x), expected()
    spread = (truth * (1 - truth) / len(x)).sqrt()
    print(found.tolist(), ((found - truth) / spread).tolist())
    assert ((found - truth).abs() < 3 * spread).all()


@pytest.mark.parametrize("plan", [ddim, ancestral, heun, dpm_solver_2m, sde_dpm_solver_2m])
def test_samples_of_the_mixture_in_the_right_shares(plan):
    model = CDM(Exact(CLASSES), CLASSES, (2, 1, 1))
    sigmas = model.sigmas[::2] if plan is heun else model.sigmas
    check_shares(Engine(model, batch=N).sample(N, plan=plan(sigmas).on_levels(model.sigmas)))


@pytest.mark.parametrize("make", [schedules.vp_geometric, schedules.ve_geometric])
def test_annealed_langevin_too(make):
    classes = make(12, 6.0, 0.1)
    model = CDM(Exact(classes), classes, (2, 1, 1))
    start = {"start": "normal", "start_scale": 6.0}
    check_shares(Engine(model, batch=500).sample(500, plan=annealed_langevin(model.sigmas, 20, step_lr=1e-3, **start)))


def test_one_classifier_serves_metropolis_at_every_level():
    """In VE form: chains start at the truth of each level, and stay there at a step where plain Langevin does not."""
    classes = schedules.ve_geometric(4, 2.0, 0.3)
    model = CDM(Exact(classes), classes, (2, 1, 1))
    plan = annealed_langevin(model.sigmas, 12, step_lr=0.09, denoise=False, start="normal", start_scale=2.0)
    found = mala(model, plan, N)
    assert (found.acceptance > 0.5).all() and (found.acceptance < 0.999).all()
    from sgm_engine.keys import Key

    key = Key(9, torch.arange(N))
    x = TRIPLE.sample(key) + 0.3 * key.normal(torch.empty(N, 2, dtype=torch.float64), 3)
    level = torch.full((N,), 3)
    energy = [model.log_q(v.view(N, 2, 1, 1).double(), level).mean().item() for v in (found.x, x)]
    print(energy, found.acceptance[[0, 11, 12, -1]])
    assert abs(energy[0] - energy[1]) < 0.08


def test_a_choice_of_levels_is_exact():
    model = small(levels=12)
    few = np.asarray(model.sigmas)[::3]
    one = Engine(model.at_sigmas(few), 4).sample(4, plan=ddim(few))
    other = Engine(model, 4).sample(4, plan=ddim(few).on_levels(model.sigmas))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
