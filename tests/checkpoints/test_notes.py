"""What travels with weights: the law of the data and the front of plans, through every way that weights go."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sgm_engine.checkpoints.bundled import load_bundled, plan_for
from sgm_engine.checkpoints.checkpoint import CheckpointError, convert, load_checkpoint, save_checkpoint
from sgm_engine.checkpoints.good_plan import good_plan, start_at
from sgm_engine.checkpoints.notes import is_ours, write_notes
from sgm_engine.engine.engine import Engine
from sgm_engine.evaluation.features import open_extractor
from sgm_engine.models.conditioning import at_sigmas, conditioned
from sgm_engine.models.score_model import as_score
from sgm_engine.plans.front import Front, Point
from sgm_engine.plans.law import DataLaw
from sgm_engine.plans.samplers import dpm_solver_2m, sde_dpm_solver_2m
from sgm_engine.plans.schedule import karras

LAW = DataLaw(np.linspace(0, 0.5, 64).reshape(1, 8, 8).round(3), 0.25)
LEVELS = np.float32([1.0, 0.3, 0.1]).tolist()
TWO, THREE = {"name": "ddim", "sigmas": [1.0, 0.1]}, {"name": "sde_dpm_solver_2m", "sigmas": LEVELS}
FIVE = {"name": "dpm_solver_2m", "sigmas": karras(1, 0.1, 5).tolist()}


def front(*points):
    return Front(points, "Fréchet distance", "digits:test", "pixels", "float32", "sgm tune", 100, 1)


FRONT = front(Point(2, 9.0, 8.0, 10.0, TWO), Point(3, 5.0, 4.0, 6.0, THREE), Point(5, 4.8, 4.0, 6.0, FIVE))


@pytest.fixture
def model(tiny_weights):
    model = load_checkpoint(tiny_weights)
    assert model.law is None and model.front is None
    model.law, model.front = LAW, FRONT
    return model


def carries(model):
    return model.front == FRONT and np.array_equal(model.law.mean, LAW.mean) and model.law.std == LAW.std


def test_they_survive_saving_loading_and_converting(model, tmp_path):
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert carries(load_checkpoint(tmp_path / "a.safetensors"))
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert carries(load_checkpoint(tmp_path / "b.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert carries(copy.deepcopy(model)) and carries(at_sigmas(model, [0.9, 0.2])) and carries(as_score(model))


def test_a_family_keeps_them_too(tmp_path):
    from sgm_engine.models.family import FamilyConfig

    network = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1]}
    network |= {"num_blocks": 1, "attn_resolutions": []}
    plan, scheme = {"name": "heun", "nfe": 5}, {"name": "edm", "sigma_data": 0.5}
    with torch.random.fork_rng():
        model = FamilyConfig("SongUNet", network, 1, (8, 8), scheme, (-1.0, 1.0), 0.002, 80.0, plan).build()
    assert start_at(model, 40.0) == {"start_scale": 40.0, "start_shift": 0.5}  # as its authors start
    model.law = LAW
    save_checkpoint(model, tmp_path / "a.safetensors")
    model = load_checkpoint(tmp_path / "a.safetensors")
    assert np.array_equal(model.law.mean, LAW.mean) and np.array_equal(model.at_sigmas([2.0]).law.mean, LAW.mean)
    assert start_at(model, 40.0)["start_scale"] == LAW.start(40.0)["start_scale"]


def test_notes_change_nothing_else_in_a_file(model, tiny_weights, tmp_path):
    written = tmp_path / "a.safetensors"
    write_notes(tiny_weights, written, model)
    assert carries(load_checkpoint(written)) and is_ours(written) and not is_ours(tmp_path)
    before, after = load_file(tiny_weights), load_file(written)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with safe_open(written, "np") as a, safe_open(tiny_weights, "np") as b:
        assert {k: v for k, v in a.metadata().items() if k not in ("data", "front")} == b.metadata()
    model.front = front(FRONT.points[0])
    write_notes(written, written, model)
    assert load_checkpoint(written).front == model.front


@pytest.mark.parametrize(
    "notes, says",
    [
        ({"data": "{"}, "bad law of the data"),
        ({"data": '{"mean": 0.5, "std": 1}'}, "bad law of the data.*must have mean, std, low and high"),
        ({"data": json.dumps(DataLaw(np.zeros((1, 4, 4)), 1).to_dict())}, r"law.*images \[1, 4, 4\]"),
        ({"front": "[]"}, "bad front of plans"),
        ({"front": front(Point(4, 1.0, 0.0, 2.0, THREE)).to_json()}, "front.*of 3 sigmas does not take nfe = 4"),
        ({"front": front(Point(2, 1.0, 0.0, 2.0, {"name": "ddim", "sigmas": [0.1, 1.0]})).to_json()}, "must descend"),
        ({"front": front(Point(2, 1.0, 0.0, 2.0, TWO | {"eta": 2})).to_json()}, "eta must lie"),
    ],
)
def test_bad_notes_are_one_line(tiny_weights, tmp_path, notes, says):
    with safe_open(tiny_weights, "np") as file:
        metadata = file.metadata()
    save_file(load_file(tiny_weights), tmp_path / "bad.safetensors", metadata | notes)
    with pytest.raises(CheckpointError, match=f"bad.safetensors: has a {says}" if says[0] == "b" else says) as error:
        load_checkpoint(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


# -- what is made of them ----------------------------------------------------------------------------------------------


def test_the_default_is_the_trade_and_the_config_is_one_argument_away(model):
    assert plan_for(model) == sde_dpm_solver_2m(model.sigmas, **LAW.start(1.0)) == Engine(model, 2).default_plan
    assert plan_for(model, "annealed_langevin").nfe == 7 and plan_for(model, steps_per_level=3).nfe == 10
    assert np.array_equal(plan_for(model, "ddim").start_shift, LAW.mean)
    model.front = front(FRONT.points[2])  # between the levels only: not for an engine of the model itself
    assert plan_for(model).name == "annealed_langevin"
    model.front = front(*FRONT.points[:2])
    other = at_sigmas(model, [1.0, 0.1])  # of the front what its levels hold
    assert plan_for(other).nfe == 2 and Engine(other, 2).sample(1).isfinite().all()
    model.front = None
    assert plan_for(model).name == "annealed_langevin"


def test_a_number_or_a_quality_takes_the_best_of_the_front(model):
    named = {q: good_plan(model, quality=q).nfe for q in ("draft", "good", "best")}
    assert named == {"draft": 2, "good": 3, "best": 5}
    assert [good_plan(model, n).nfe for n in (2, 3, 4, 5, 50)] == [2, 3, 3, 5, 5]
    assert good_plan(model, 50, between=False).nfe == 3
    assert good_plan(model, 5) == dpm_solver_2m(karras(1, 0.1, 5), **LAW.start(1.0))
    one = "pass one of them"
    bad = [
        ({}, one),
        ({"nfe": 5, "quality": "good"}, one),
        ({"quality": "fine"}, "quality must be"),
        ({"nfe": 0}, "nfe"),
    ]
    for given, says in bad:
        with pytest.raises(ValueError, match=says):
            good_plan(model, **given)


def test_without_a_front_a_rule_serves(model):
    model.front = None
    plan = good_plan(model, 7)
    assert (plan.name, plan.nfe) == ("dpm_solver_2m", 7) and np.array_equal(plan.start_shift, LAW.mean)
    assert good_plan(model, quality="good").name == "sde_dpm_solver_2m"
    own = good_plan(model, 10, between=False)
    assert own.nfe == 3 and np.array_equal(own.sigma, np.float64(model.sigmas))
    assert Engine(lambda x, level: -x, 2, sigmas=[1.0, 0.3, 0.1], shape=(1, 4, 4)).sample(1, nfe=2).shape[0] == 1
    assert conditioned(model, plan)[1].nfe == 7 and good_plan(model, 10).name == "sde_dpm_solver_2m"


def test_an_engine_takes_them(model):
    engine = Engine(model, 2)
    want = engine.sample(2, plan=sde_dpm_solver_2m(model.sigmas, **LAW.start(1.0)))
    for asked in ({}, {"nfe": 3}, {"nfe": 4}, {"quality": "good"}):
        assert torch.equal(engine.sample(2, **asked), want), asked
    assert not torch.equal(engine.sample(2, nfe=2), want)
    with pytest.raises(ValueError, match="plan, nfe and quality: pass one of them"):
        engine.sample(1, plan=plan_for(model), nfe=3)


def test_where_chains_start_without_a_law(tiny_weights):
    model = load_checkpoint(tiny_weights)
    assert start_at(model, 1.0) == {}
    model.plan = {"name": "ddim", "start_shift": 0.13}
    assert start_at(model, 1.0) == {"start_scale": 1.0, "start_shift": 0.13}
    edm = as_score(lambda x, sigma: x, "edm", sigmas=[3.0, 1.0], sigma_data=4.0)
    assert start_at(edm, 3.0) == {"start_scale": 5.0}


def test_the_bundled_weights_have_both():
    model, plan = load_bundled()
    assert model.law.mean.shape == (1, 28, 28) and model.front.n >= 1000
    assert model.front.features == open_extractor("digits").name and "--features digits" in model.front.command
    assert plan == good_plan(model, quality="good", between=False)
    assert plan.nfe <= 12 < plan_for(model, "annealed_langevin").nfe == 121
    assert np.array_equal(plan.start_shift, model.law.mean) and model.front.within(10).nfe <= 10
