"""The data's law and the front of plans: what they hold, what they choose, and that their texts are checked."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from sgm_engine.checkpoints.bundled import load_bundled
from sgm_engine.engine.engine import Engine
from sgm_engine.kernels import noise
from sgm_engine.plans.front import Front, Point, recipe_of
from sgm_engine.plans.law import DataLaw
from sgm_engine.plans.plan import Plan, annealed_langevin, ddim
from sgm_engine.plans.samplers import SAMPLERS, heun, sde_dpm_solver_2m
from sgm_engine.plans.schedule import geometric

SIGMAS = geometric(5, 0.05, 12)
MEAN = np.arange(12.0).reshape(3, 2, 2) / 10


def point(nfe, value, half=0.5, **recipe):
    path = {"sigmas": geometric(5, 0.05, nfe).tolist()}
    return Point(nfe, value, value - half, value + half, {"name": "sde_dpm_solver_2m"} | path | recipe)


def front(*points):
    return Front(points, "Fréchet distance", "digits:test", "a classifier", "bfloat16", "sgm tune", 1000, 7)


# -- the law -----------------------------------------------------------------------------------------------------------


def test_the_law_of_images_is_that_of_every_pixel():
    images = np.random.default_rng(0).integers(0, 256, (500, 3, 2, 2), dtype=np.uint8)
    x = (images + 0.5) / 256
    law = DataLaw.of(images[i : i + 128] for i in range(0, 500, 128))
    np.testing.assert_allclose(law.mean, x.mean(0), atol=5.1e-4)
    assert law.std == pytest.approx(np.sqrt(np.square(x - x.mean(0)).mean()), abs=1e-3)
    start = law.start(2.0)
    assert start["start_scale"] == pytest.approx(np.sqrt(4 + law.std**2)) and start["start_shift"] is law.mean
    again = DataLaw.from_dict(json.loads(json.dumps(law.to_dict())))
    assert np.array_equal(again.mean, law.mean) and again.std == law.std and again.to_dict() == law.to_dict()
    wide = DataLaw.of([images], -1.0, 1.0)
    np.testing.assert_allclose(wide.mean, 2 * x.mean(0) - 1, atol=5.1e-4)
    assert wide.std == pytest.approx(2 * law.std, abs=1e-3) and (wide.low, wide.high) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="at least one image"):
        DataLaw.of([])


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"mean": [0.5]}, r"mean must be a number, got shape \[1\]"),
        ({"mean": "x"}, "mean must be a number"),
        ({"mean": [[[float("nan")]]]}, "mean must be finite"),
        ({"std": -1.0}, "std must be >= 0, got -1.0"),
        ({"std": float("inf")}, "std must be finite"),
        ({"high": 0.0}, "low must be below high, got 0.0 and 0.0"),
    ],
)
def test_a_law_that_is_none_is_refused(fields, says):
    with pytest.raises((ValueError, TypeError), match=says):
        DataLaw(**{"mean": 0.5, "std": 0.2} | fields)


def test_a_law_of_other_fields_or_another_shape_is_refused():
    with pytest.raises(ValueError, match="must have mean, std, low and high"):
        DataLaw.from_dict({"mean": 0.0})
    DataLaw(0.5, 0.1).check_shape((3, 2, 2))
    with pytest.raises(ValueError, match=r"images \[3, 2, 2\], and samples are \[1, 2, 2\]"):
        DataLaw(MEAN, 0.1).check_shape((1, 2, 2))


# -- a start around the mean of each pixel -----------------------------------------------------------------------------


def test_a_chain_starts_around_the_mean_of_each_pixel():
    """One row that changes nothing: a sample is its own start, and each has the same noise around the same mean."""
    plan = Plan([0], [1.0], [1], [0], [0], start="normal", start_scale=3.0, start_shift=MEAN)
    engine = Engine(lambda x, level: -x, 2, sigmas=[1.0], shape=(3, 2, 2))
    z = torch.from_numpy(noise.fill((5, 3, 2, 2), np.full(5, 9), np.arange(2, 7), 0, kind="normal"))
    assert torch.equal(engine.sample(5, 9, plan, first_id=2), z * 3 + torch.tensor(MEAN, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"start_shift \[3, 2, 2\], where samples are \[3, 4, 4\]"):
        Engine(lambda x, level: -x, 2, sigmas=[1.0], shape=(3, 4, 4)).sample(1, plan=plan)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_family_starts_there_and_its_json_says_so(name):
    options = {"start": "normal", "steps_per_level": 2, "step_lr": 1e-3} if name == "annealed_langevin" else {}
    plan = SAMPLERS[name](SIGMAS, start_scale=5.1, start_shift=MEAN, **options)
    assert np.array_equal(plan.start_shift, MEAN) and plan.start_scale == 5.1
    again = Plan.from_json(plan.to_json())
    assert again == plan and np.array_equal(again.start_shift, MEAN) and "mean of each pixel" in plan.describe()
    assert replace(plan, start_shift=MEAN + 1e-9) != plan != replace(plan, start_shift=0.5)
    with pytest.raises(ValueError, match="read-only"):
        plan.start_shift[0] = 1


# -- the front ---------------------------------------------------------------------------------------------------------


def test_the_best_within_a_number_and_by_quality():
    f = front(point(5, 20.0), point(6, 9.0), point(10, 7.0), point(20, 7.2), point(40, 6.8))
    assert [f.within(n) and f.within(n).nfe for n in (4, 5, 9, 10, 30, 40, 99)] == [None, 5, 6, 10, 10, 40, 40]
    assert [f.named(q).nfe for q in ("draft", "good", "best")] == [5, 10, 40]
    assert front(point(5, 20.0), point(10, 7.0), point(40, 5.9)).named("good").nfe == 40  # its interval lies below
    assert front(point(5, 20.0), point(10, 7.0, 0.7), point(40, 5.9)).named("good").nfe == 10
    with pytest.raises(ValueError, match="quality must be one of draft, good, best, got 'fine'"):
        f.named("fine")


def test_the_part_on_own_levels():
    own = point(3, 9.0, sigmas=SIGMAS[[0, 5, 11]].astype(np.float32).tolist())
    f = front(own, point(5, 8.0), point(12, 7.0))
    assert [p.nfe for p in f.on_own_levels(SIGMAS).points] == [3, 12]
    assert front(point(5, 8.0)).on_own_levels(SIGMAS) is None


def test_a_point_makes_its_plan_from_the_law():
    law = DataLaw(MEAN, 0.3)
    found = point(5, 8.0).plan(law.start)
    assert found == sde_dpm_solver_2m(geometric(5, 0.05, 5), **law.start(5.0)) and found.nfe == 5
    assert point(12, 8.0).plan(law.start) == sde_dpm_solver_2m(SIGMAS, **law.start(SIGMAS[0]))
    with pytest.raises(ValueError, match="of 12 sigmas does not take nfe = 11"):
        Point(11, 1.0, 0.0, 2.0, {"name": "ddim", "sigmas": SIGMAS.tolist()}).plan(law.start)


def test_the_table_has_a_line_a_point_and_the_text_survives():
    f = front(point(5, 20.0), point(10, 7.0), point(12, 6.9, name="ddim", eta=0.5))
    again = Front.from_json(f.to_json())
    assert again == f and again.table() == f.table()
    lines = f.table().splitlines()[4:]
    assert [line.split()[0] for line in lines] == ["5", "10", "12"] and "(good)" in lines[1] and "(best)" in lines[2]
    assert [line.count("█") for line in lines] == [24, 8, 8] and "eta 0.5" in lines[2]


def test_each_interval_is_beside_the_figure_it_is_of():
    """Of a Fréchet distance that is the corrected one; a text without it is read, and says no less."""
    biased = replace(point(5, 9.0), low=7.0, high=8.5, corrected=7.75)
    f = front(biased, point(10, 7.0))
    lines = f.table().splitlines()
    assert lines[1].endswith("; corrected and its interval: without the bias of so few samples")
    assert lines[4].split()[:6] == ["5", "9.000", "7.750", "7", "…", "8.5"] and lines[5].split()[2] == "6.5"
    assert Front.from_json(f.to_json()) == f
    fields = json.loads(f.to_json())
    for p in fields["points"]:
        del p["corrected"]
    bare = Front.from_json(json.dumps(fields))
    assert bare == front(replace(biased, corrected=None), point(10, 7.0))
    assert "without the bias" in bare.table() and "without the bias" not in front(point(10, 7.0)).table()
    with pytest.raises(ValueError, match="corrected must be finite, got nan"):
        replace(biased, corrected=float("nan"))


def test_of_the_bundled_weights_each_interval_contains_its_figure():
    for p in load_bundled()[0].front.points:
        assert p.low < p.corrected < p.high and p.corrected < p.value


def test_fronts_measured_alike_stand_beside_each_other():
    first, second = front(point(5, 20.0), point(10, 7.0), point(40, 6.8)), front(point(6, 9.0), point(10, 6.5))
    both = second.beside(first)
    assert [(p.nfe, p.value) for p in both.points] == [(5, 20.0), (6, 9.0), (10, 6.5)]
    assert both.command == "sgm tune" and replace(second, command="b").beside(first).command == "sgm tune; b"
    for other in ({"seed": 8}, {"n": 999}, {"features": "pixels"}, {"precision": "float32"}):
        assert second.beside(replace(first, **other)) == second


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d: d.pop("seed"), "must have measure"),
        (lambda d: d.update(n="many"), "n must be an integer"),
        (lambda d: d.update(measure="x\n"), "measure must be at most 100,000 characters that can be printed"),
        (lambda d: d.update(points=[]), "1 to 64 points, got 0"),
        (lambda d: d["points"].reverse(), r"rising evaluations, got \[10, 5\]"),
        (lambda d: d["points"][0].pop("low"), "points must have nfe"),
        (lambda d: d["points"][0].update(nfe=10**9), "nfe must be an integer from 1 to 10,000"),
        (lambda d: d["points"][0].update(value=None), "value must be a number"),
        (lambda d: d["points"][0]["recipe"].update(name="rk45"), "name must be one of"),
        (lambda d: d["points"][0]["recipe"].pop("sigmas"), "sigmas must be a list of numbers, got None"),
        (lambda d: d["points"][0]["recipe"].update(eta=1), "takes no eta"),
    ],
)
def test_a_front_that_is_none_is_refused(change, says):
    fields = json.loads(front(point(5, 20.0), point(10, 7.0)).to_json())
    change(fields)
    with pytest.raises((ValueError, TypeError), match=says):
        Front.from_json(json.dumps(fields))


PLANS = {
    "ddim": ddim(SIGMAS, eta=0.3, **DataLaw(MEAN, 0.3).start(5.0)),
    "heun": heun(SIGMAS, s_churn=5, **DataLaw(MEAN, 0.3).start(5.0)),
    "another start": ddim(SIGMAS, start_scale=4.0, start_shift=0.5),
    "annealed": annealed_langevin(SIGMAS, 2, 1e-3, start="normal", **DataLaw(MEAN, 0.3).start(5.0)),
    "uniform": annealed_langevin(SIGMAS, 2, 1e-3),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_becomes_a_recipe_that_makes_it_again(name):
    law = DataLaw(MEAN, 0.3)
    recipe = json.loads(json.dumps(recipe_of(PLANS[name], SIGMAS, law.start)))
    assert Point(PLANS[name].nfe, 1.0, 0.0, 2.0, recipe).plan(law.start) == PLANS[name]
    assert ("start_shift" in recipe) == (name in ("another start", "uniform"))


def test_a_plan_that_no_sampler_makes_has_no_recipe():
    plan = replace(PLANS["ddim"], b=PLANS["ddim"].b * 0.9)
    with pytest.raises(ValueError, match="ddim with the options that it names is not this plan of 12 rows"):
        recipe_of(plan, SIGMAS, DataLaw(0.5, 0.3).start)
    with pytest.raises(ValueError, match="mine is the name of no sampler"):
        recipe_of(replace(plan, name="mine"), SIGMAS, partial(DataLaw.start, DataLaw(0.5, 0.3)))
