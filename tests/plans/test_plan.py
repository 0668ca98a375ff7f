"""Plans: the tables that samplers make, what a table is refused for, and how it travels."""

import dataclasses
import fractions
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgm_engine.models.cdm.classes import variance_exploding
from sgm_engine.models.guidance import classifier_free, classifier_guided, posterior
from sgm_engine.plans.plan import (
    COLUMNS,
    Plan,
    ancestral,
    annealed_langevin,
    consistent_annealed,
    ddim,
    reverse_diffusion,
)
from sgm_engine.plans.samplers import euler, heun, predictor_corrector
from sgm_engine.plans.schedule import check_sigmas, geometric, karras, ncsnv2, nearest_level

SIGMAS = geometric(1, 0.01, 10)
SAMPLERS = [annealed_langevin, consistent_annealed, ancestral, reverse_diffusion, ddim]


def rows(**changes):
    """A good table of three rows, as keyword arguments."""
    table = {"level": [0, 1, 1], "sigma": [1, 0.1, 0.1], "a": [1, 1, 1], "b": [0.1, 0.001, 0.001], "c": [0.4, 0.04, 0]}
    return table | changes


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_geometric():
    assert SIGMAS[0] == 1 and SIGMAS[-1] == pytest.approx(0.01) and len(SIGMAS) == 10
    np.testing.assert_allclose(SIGMAS[1:] / SIGMAS[:-1], 0.01 ** (1 / 9))


@pytest.mark.parametrize(
    "sigmas, says",
    [
        ([], "non-empty"),
        ([[1, 0.5]], "vector"),
        ([1, -0.5], r"sigmas\[1\] = -0.5"),
        ([1, float("nan")], r"sigmas\[1\] = nan"),
        ([float("inf"), 1], r"sigmas\[0\] = inf"),
        ([0.1, 0.5, 1], r"sigmas\[0\] = 0.1 before sigmas\[1\] = 0.5"),
        ([1, 0.5, 0.5], r"sigmas\[1\] = 0.5 before sigmas\[2\] = 0.5"),
    ],
)
@pytest.mark.parametrize("function", [check_sigmas, *SAMPLERS])
def test_bad_sigmas_are_named(function, sigmas, says):
    with pytest.raises(ValueError, match=says):
        function(sigmas)


@pytest.mark.parametrize("arguments", [(0.01, 1, 10), (1, 0, 10), (1, 0.1, 0), (1, 0.1, 1), (float("nan"), 0.1, 3)])
def test_geometric_refuses(arguments):
    with pytest.raises(ValueError, match="geometric"):
        geometric(*arguments)


def test_check_sigmas_takes_tensors_and_copies():
    sigmas = torch.tensor([1.0, 0.1])
    checked = check_sigmas(sigmas)
    sigmas[0] = 5
    assert checked.dtype == np.float64 and checked[0] == 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20, unique=True), st.floats(1e-4, 1e4))
def test_nearest_level_is_the_nearest(sigmas, sigma):
    sigmas = np.array(sorted(sigmas, reverse=True))
    distance = np.abs(np.log(sigmas) - np.log(sigma))
    assert distance[nearest_level(np.array([sigma]), sigmas)[0]] <= distance.min() + 1e-9


# -- what samplers return ----------------------------------------------------------------------------------------------


def test_annealed_langevin_is_the_papers_table():
    plan = annealed_langevin(SIGMAS)
    assert plan.nfe == 1001
    assert plan.level.tolist() == [i for i in range(10) for _ in range(100)] + [9]
    np.testing.assert_array_equal(plan.sigma, SIGMAS[plan.level])
    step_size = 2e-5 * (SIGMAS / SIGMAS[-1]) ** 2
    np.testing.assert_allclose(plan.b[:-1:100], step_size, rtol=1e-14)
    np.testing.assert_allclose(plan.c[:-1:100], np.sqrt(2 * step_size), rtol=1e-14)
    assert (plan.a[-1], plan.b[-1], plan.c[-1]) == (1, SIGMAS[-1] ** 2, 0)
    assert not plan.d.any() and plan.start == "uniform"


def test_the_papers_convention_is_half_the_codes_step():
    code, paper = (annealed_langevin(SIGMAS, step_lr=lr, convention=c) for lr, c in ((1e-5, "code"), (2e-5, "paper")))
    np.testing.assert_allclose(paper.b, code.b, rtol=1e-14)
    np.testing.assert_allclose(paper.c, code.c, rtol=1e-14)


def test_without_denoising_the_last_row_has_noise():
    plan = annealed_langevin(SIGMAS, 3, denoise=False)
    assert plan.nfe == 30 and plan.c[-1] > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_with_denoising(sampler):
    plan = sampler(SIGMAS)
    assert (plan.level[-1], plan.a[-1], plan.c[-1]) == (9, 1, 0) and plan.b[-1] == pytest.approx(1e-4)
    assert plan.name == sampler.__name__


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: annealed_langevin(SIGMAS, 0), "steps_per_level must be an integer >= 1, got 0"),
        (lambda: annealed_langevin(SIGMAS, 2.5), "steps_per_level .* got 2.5"),
        (lambda: annealed_langevin(SIGMAS, True), "steps_per_level .* got True"),
        (lambda: annealed_langevin(SIGMAS, step_lr=0), "step_lr must be positive"),
        (lambda: annealed_langevin(SIGMAS, step_lr=float("nan")), "step_lr .* got nan"),
        (lambda: annealed_langevin(SIGMAS, convention="both"), "convention .* got 'both'"),
        (lambda: annealed_langevin(SIGMAS, start="zeros"), "start .* got 'zeros'"),
        (
            lambda: annealed_langevin(SIGMAS, step_lr=2e-4),
            r"step_lr = 0.0002 must diverge: for σ_L = 0.01 .* below 0.0002",
        ),
        (
            lambda: annealed_langevin(SIGMAS, step_lr=4e-4, convention="paper"),
            "step_lr = 0.0004 .* below 0.0004, 4·σ_L²",
        ),
        (lambda: consistent_annealed(SIGMAS, eta=0.1), "eta must lie in .* got 0.1"),
        (lambda: consistent_annealed(SIGMAS, eta=1.7), "eta must lie in .* got 1.7"),
        (lambda: consistent_annealed(SIGMAS, 0), "steps_per_level"),
    ],
)
def test_samplers_refuse(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "name, call",
    {
        "sigma_max": lambda: geometric("1", 0.1, 3),
        "rho": lambda: karras(1, 0.1, 3, rho="7"),
        "overlap": lambda: ncsnv2(1, 0.1, 3072, overlap=None),
        "sigmas": lambda: annealed_langevin(["a", "b"]),
        "step_lr": lambda: annealed_langevin(SIGMAS, step_lr="2e-5"),
        "denoise": lambda: annealed_langevin(SIGMAS, denoise="no"),
        "start_scale": lambda: ddim(SIGMAS, start_scale="1"),
        "start_shift": lambda: heun(SIGMAS, start_shift=[0.5]),
        "eta": lambda: consistent_annealed(SIGMAS, eta="1"),
        "s_churn": lambda: euler(SIGMAS, s_churn="40"),
        "snr": lambda: predictor_corrector(SIGMAS, snr=True),
        "b": lambda: Plan(**rows(b=[0.1, "much", 0.1])),
        "c": lambda: Plan(**rows(c=[[0.4, 0.1], 0.04, 0])),
        "scale": lambda: classifier_guided(None, None, scale="2", sigmas=SIGMAS),
        "weight": lambda: classifier_free(None, None, "2", sigmas=SIGMAS),
        "noise": lambda: posterior(None, None, None, noise="0.1"),
        "reference": lambda: variance_exploding(SIGMAS, "20"),
    }.items(),
)
def test_what_is_no_number_is_refused_by_name(name, call):
    with pytest.raises(TypeError, match=rf"^{name} must be (a number|numbers|True or False), got "):
        call()


def test_numbers_of_any_kind_are_numbers():
    plain, churned = ddim(SIGMAS, eta=0.5, start_scale=2.0), heun(SIGMAS, s_churn=0.5)
    for kind in (np.float32, np.array, torch.tensor, fractions.Fraction):
        assert ddim(SIGMAS, eta=kind(0.5), start_scale=kind(2.0)) == plain
        assert Plan.from_json(heun(SIGMAS, s_churn=kind(0.5)).to_json()) == churned


def test_the_largest_stable_step_is_accepted():
    assert annealed_langevin(SIGMAS, step_lr=1.99e-4).nfe == 1001
    assert annealed_langevin(SIGMAS, step_lr=3.99e-4, convention="paper").nfe == 1001


# -- the table itself --------------------------------------------------------------------------------------------------


def test_a_custom_table():
    plan = Plan(**rows())
    assert plan.nfe == 3 and plan.d.tolist() == [0, 0, 0]
    assert plan.level.dtype == np.int64 and all(getattr(plan, name).dtype == np.float64 for name in COLUMNS[1:])


def test_plans_are_frozen():
    given = np.array([1.0, 0.1, 0.1])
    plan = Plan(**rows(sigma=given))
    given[0] = 7
    assert plan.sigma[0] == 1
    with pytest.raises(ValueError):
        plan.b[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.b = None


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"level": []}, "level must be a vector of at least one row"),
        ({"level": [0.0, 1.0, 1.0]}, "level must hold integers"),
        ({"level": [0, -1, 1]}, "level .* -1 to 1"),
        ({"level": np.array([0, 2**63, 1], np.uint64)}, r"level .* below 2\*\*31"),
        ({"sigma": [1, 0.1]}, r"sigma has shape \(2,\)"),
        ({"sigma": [1, 0, 0.1]}, r"sigma\[1\] = 0"),
        ({"a": [1, float("nan"), 1]}, r"a\[1\] = nan"),
        ({"b": [float("inf"), 0, 0]}, r"b\[0\] = inf"),
        ({"c": [0, 0, 1e39]}, r"finite in float32, got c\[2\] = 1e\+39"),
        ({"d": [0, 0]}, "d has shape"),
        ({"b": [0.1, 0.02, 0]}, r"b\[1\] = 0.02 must diverge at sigma\[1\] = 0.1"),
        ({"start": "ones"}, "start"),
        ({"start_scale": -1.0}, "start_scale .* got -1"),
        ({"start_scale": float("nan")}, "start_scale"),
        ({"start_shift": float("inf")}, "start_shift"),
    ],
)
def test_bad_tables_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        Plan(**rows(**changes))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_json_round_trip_is_exact(sampler):
    plan = sampler(SIGMAS)
    back = Plan.from_json(plan.to_json())
    assert back == plan and hash(back) == hash(plan) and back.metadata == plan.metadata and back.name == plan.name
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(back, name), getattr(plan, name))


def _edited(**changes):
    content = json.loads(Plan(**rows()).to_json()) | changes
    return json.dumps({k: v for k, v in content.items() if v is not Ellipsis}, default=str)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "invalid JSON"),
        ("[1]", "not a plan"),
        ('{"a": [1]}', "not a plan"),
        (_edited(version=3), "version 3 is not supported: this release reads versions 1 and 2"),
        (_edited(version=None), "version None"),
        (_edited(extra=1), r"unknown \['extra'\]"),
        (_edited(b="1"), "b "),
        (_edited(b=[1, 2]), "b has shape"),
        (_edited(b=["x", 1, 1]), "not a plan: b must be numbers"),
        (_edited(start=["uniform"]), "start"),
        (_edited(start_scale="big"), "not a plan"),
    ],
)
def test_bad_json_is_refused_with_a_reason(text, says):
    with pytest.raises(ValueError, match=says):
        Plan.from_json(text)


def test_missing_field_is_named():
    content = json.loads(Plan(**rows()).to_json())
    del content["c"]
    with pytest.raises(ValueError, match=r"missing \['c'\]"):
        Plan.from_json(json.dumps(content))


def test_digest_is_of_what_decides_a_sample():
    plan = Plan(**rows())
    assert dataclasses.replace(plan, name="other", metadata={"x": 1}) == plan
    for changes in ({"start_scale": 2.0}, {"start": "normal"}, {"b": [0.1, 0.001, 0.0011]}, {"level": [0, 1, 2]}):
        assert dataclasses.replace(plan, **changes) != plan


def test_describe_groups_equal_rows():
    text = annealed_langevin(SIGMAS).describe()
    assert "1001 network evaluations" in text and "100–199" in text
    assert len(text.splitlines()) == 3 + 10 + 1
