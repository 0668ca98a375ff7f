"""The rules by which named samplers step with some weights: what they hold, what they make, what is refused."""

import json
from dataclasses import replace

import pytest

from sgm_engine.checkpoints.bundled import load_bundled
from sgm_engine.checkpoints.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sgm_engine.checkpoints.good_plan import good_plan, sampler_plan, start_at
from sgm_engine.models.conditioning import conditioned
from sgm_engine.plans.front import Front
from sgm_engine.plans.plan import ancestral
from sgm_engine.plans.samplers import SAMPLERS, heun, sa_solver
from sgm_engine.plans.schedule import geometric, karras
from tests.checkpoints.test_notes import FRONT, LAW

STEPS = {
    "heun": {"schedule": "geometric", "sigma_min": 0.2, "s_churn": 40.0, "s_tmax": 0.7},
    "sa_solver": {"schedule": "karras", "rho": 3.0, "sigma_min": 0.15, "tau": 1.4},
    "ancestral": {"schedule": "linear", "sigma_min": 0.3},
}
STEPPED = replace(FRONT, steps=STEPS)


@pytest.fixture
def model(tiny_weights):
    model = load_checkpoint(tiny_weights)
    model.law, model.front = LAW, STEPPED
    return model


def test_a_sampler_steps_as_the_front_says(model):
    start = start_at(model, 1.0)
    churned = {"s_churn": 40.0, "s_tmax": 0.7}
    assert sampler_plan(model, "heun", 9) == heun(geometric(1, 0.2, 5), **churned, **start)
    assert sampler_plan(model, "sa_solver", 6) == sa_solver(karras(1, 0.15, 6, 3.0), 1.4, **start)
    assert sampler_plan(model, "sa_solver", 6, tau=0.5) == sa_solver(karras(1, 0.15, 6, 3.0), 0.5, **start)
    said = sampler_plan(model, "sa_solver", 6).metadata
    assert {"schedule": "karras", "rho": 3.0, "sigma_min": 0.15, "tau": 1.4}.items() <= said.items()


def test_a_schedule_that_is_named_spans_the_levels_and_other_samplers_take_karras(model):
    start, levels = start_at(model, 1.0), model.sigmas.double().numpy()
    want = ancestral(geometric(levels[0], levels[-1], 6), **start)
    assert sampler_plan(model, "ancestral", 6, "geometric") == want != sampler_plan(model, "ancestral", 6)
    assert sampler_plan(model, "sa_solver", 6, "karras") == sa_solver(karras(levels[0], levels[-1], 6), **start)
    want = SAMPLERS["euler"](karras(levels[0], levels[-1], 6), **start)
    assert sampler_plan(model, "euler", 6) == want
    assert good_plan(model, 4) == FRONT.within(4).plan(LAW.start)  # the points are what they were


def test_they_survive_texts_files_and_other_fronts(model, tmp_path):
    again = Front.from_json(STEPPED.to_json())
    assert again == STEPPED and "--sampler heun: geometric to 0.2, s_churn 40, s_tmax 0.7" in again.table()
    assert "steps" not in json.loads(FRONT.to_json()) and Front.from_json(FRONT.to_json()).steps == {}
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors").front.steps == STEPS
    assert STEPPED.on_own_levels(model.sigmas).steps == STEPS
    other = {"heun": {"schedule": "linear", "sigma_min": 0.1}}
    for beside in (replace(FRONT, steps=other), replace(FRONT, steps=other, n=99)):
        assert beside.beside(STEPPED).steps == STEPS | other and FRONT.beside(STEPPED).steps == STEPS


@pytest.mark.parametrize(
    "steps, says",
    [
        ([], "rules by sampler"),
        ({"rk45": {}}, "steps must be of .* got 'rk45'"),
        ({"heun": None}, "heun must name a schedule"),
        ({"heun": {"schedule": "sine", "sigma_min": 0.1}}, "heun must name a schedule of geometric"),
        ({"heun": {"schedule": "linear"}}, "sigma_min must be a number, got None"),
        ({"heun": {"schedule": "linear", "sigma_min": 0}}, "heun must have a sigma_min > 0, got 0"),
        ({"heun": {"schedule": "linear", "sigma_min": 0.1, "eta": 1.0}}, "steps of heun take no eta"),
        ({"heun": {"schedule": "linear", "sigma_min": 0.1, "start_scale": 1.0}}, "steps of heun take no start_scale"),
        ({"heun": {"schedule": "linear", "sigma_min": 0.1, "rho": 2}}, "rho is of karras, not of linear"),
    ],
)
def test_steps_that_are_none_are_refused(steps, says):
    with pytest.raises((ValueError, TypeError), match=says):
        replace(FRONT, steps=steps)


@pytest.mark.parametrize("rule", [{"sigma_min": 0.1, "eta": 2.0}, {"sigma_min": 3.0}, {"sigma_min": 0.1, "eta": "x"}])
def test_a_file_with_steps_that_its_sampler_refuses_is_refused(model, tmp_path, rule):
    model.front = replace(FRONT, steps={"ddim": {"schedule": "geometric"} | rule})
    save_checkpoint(model, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="bad front of plans"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_the_command_takes_them_and_a_job_begun_before_goes_on(sgm, model, tiny_weights, tmp_path):
    weights = tmp_path / "w.safetensors"
    model.front = FRONT
    save_checkpoint(model, weights)
    job = ("sample", "--checkpoint", weights, "--sampler", "ancestral", "--nfe", 4, "--n", 3, "--batch", 2)
    assert "schedule=karras" in sgm(*job, "--out", "old/").stdout
    model.front = STEPPED
    save_checkpoint(model, weights)
    done = sgm(*job, "--out", "old/")
    assert "found: 1 shards" in done.stdout and "schedule=karras" in done.stdout, done.stderr
    assert "schedule=linear, sigma_min=0.3" in sgm(*job, "--out", "new/").stdout


def test_the_bundled_weights_say_how_samplers_step():
    """Churn keeps the noise at or below the first level, which is all that the network knows."""
    model, _ = load_bundled()
    assert {"sa_solver", "dpm_solver_2m", "heun", "euler", "ancestral"} <= model.front.steps.keys()
    for name, rule in model.front.steps.items():
        for nfe in (11, 21, 35):
            plan = sampler_plan(model, name, nfe)
            assert plan.nfe == nfe and plan.sigma.max() <= float(model.sigmas[0]) * (1 + 1e-6)
            assert rule["sigma_min"] * (1 - 1e-6) <= plan.sigma.min() < 1.5 * rule["sigma_min"]
            assert conditioned(model, plan)[1].nfe == nfe
