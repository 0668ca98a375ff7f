"""Samplers of few steps: exact laws, what is refused, one executor path for all; schedules; levels between."""

import dataclasses

import numpy as np
import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.graphs import GraphExecutor
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.models.ncsn import NCSN, NCSNv2
from sgm_engine.models.score_model import as_score
from sgm_engine.plans import schedule
from sgm_engine.plans.plan import Plan, ancestral, annealed_langevin, ddim
from sgm_engine.plans.report import examine, propagate
from sgm_engine.plans.samplers import (
    SAMPLERS,
    dpm_solver_2m,
    euler,
    heun,
    plan_of_nfe,
    predictor_corrector,
    sa_solver,
    sde_dpm_solver_2m,
)
from sgm_engine.plans.schedule import geometric, karras
from tests import mixture
from tests.plans.stepwise_samplers import DEFINITIONS, SEED, SHAPE, SIGMAS, drawn


def test_eta_joins_the_probability_flow_and_the_ancestral_sampler():
    np.testing.assert_allclose(ddim(SIGMAS, 1.0).b, ancestral(SIGMAS).b, rtol=1e-12)
    np.testing.assert_allclose(ddim(SIGMAS, 1.0).c, ancestral(SIGMAS).c, rtol=1e-12)
    np.testing.assert_allclose(ddim(SIGMAS, 0.0).b, euler(SIGMAS).b, rtol=1e-12)


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0, 50.0])
def test_churned_ancestral_steps_keep_the_noise_of_their_level(eta):
    """Of data in one point, x ~ N(0, σ²): a step leaves exactly N(0, σ'²), whatever part of it is fresh."""
    plan = ancestral(SIGMAS, eta=eta)
    now, after, b, c = SIGMAS[:-1], SIGMAS[1:], plan.b[:-1], plan.c[:-1]
    np.testing.assert_allclose((1 - b / now**2) ** 2 * now**2 + c**2, after**2, rtol=1e-12)
    np.testing.assert_allclose(c, np.minimum(eta * ancestral(SIGMAS).c[:-1], after), rtol=1e-12)
    assert plan.metadata.get("eta", 1.0) == eta
    for bad in ({"eta": 0.0}, {"eta": np.inf}, {"eta": 2.0, "beta_unit": 1.0}):
        with pytest.raises(ValueError, match="eta must be positive and finite, and 1 where beta_unit is given"):
            ancestral(SIGMAS, **bad)


def test_churn_costs_no_evaluation():
    assert heun(SIGMAS, s_churn=5).nfe == heun(SIGMAS).nfe == 2 * len(SIGMAS) - 1
    assert euler(SIGMAS, s_churn=5, s_tmin=1, s_tmax=2).sigma.max() == SIGMAS[0]
    with pytest.raises(ValueError, match="s_churn must be >= 0 and finite, got -1"):
        euler(SIGMAS, s_churn=-1)


@pytest.mark.parametrize("name", ["heun", "heun, churn", "dpm_solver_2m", "sde_dpm_solver_2m", "euler, churn"])
@pytest.mark.parametrize("variance", [0.0, 0.4])
def test_propagate_is_the_law_of_what_is_drawn(name, variance):
    plan = dataclasses.replace(DEFINITIONS[name][0], start_shift=1.0)
    total = torch.tensor(plan.sigmas**2 + variance, dtype=torch.float32)
    x = Engine(lambda x, level: -x / total[level][:, None, None, None], 16, sigmas=plan.sigmas, shape=(1, 32, 32))
    x = x.sample(16, plan=plan).double().flatten()
    factor, std = propagate(plan, variance)
    assert abs(x.mean() - factor[-1]) <= 4.9 * std[-1] / len(x) ** 0.5 + 1e-6
    assert abs(x.std() - std[-1]) <= 4.9 * std[-1] / (2 * len(x)) ** 0.5 + 1e-6


def test_examination_tells_what_is_wrong():
    assert examine(heun(SIGMAS), SIGMAS).remarks == ()
    assert examine(heun(karras(80, 0.002, 40))).narrowing == pytest.approx(1, abs=0.01)
    assert "far from the first row's sigma" in examine(ddim(SIGMAS, start_scale=1.0)).remarks[0]
    assert "its level" in examine(ddim(SIGMAS), SIGMAS * 1.1).remarks[0]
    assert "is not among the model's 3" in examine(ddim(SIGMAS), SIGMAS[:3]).remarks[0]
    text = heun(SIGMAS).describe(SIGMAS)
    assert "13 network evaluations" in text and " e " in text and "adaptive" not in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    sde_dpm_solver_2m(SIGMAS).plot(tmp_path / "plan.png", SIGMAS)
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize("batch", [1, 2])
def test_a_corrector_does_not_see_its_neighbours(batch):
    plan = predictor_corrector(SIGMAS, 2, 0.1)
    assert torch.equal(drawn(plan, batch), drawn(plan))


def test_an_adaptive_step_that_must_diverge_is_refused():
    with pytest.raises(ValueError, match="snr must lie between 0 and 1, got 1"):
        predictor_corrector(SIGMAS, snr=1.0)
    table = {"level": [0], "sigma": [1.0], "a": [1], "b": [2.0], "c": [0]}
    with pytest.raises(ValueError, match=r"b\[0\] = 2 must diverge"):
        Plan(**table, adaptive=[1])
    with pytest.raises(ValueError, match=r"adaptive must be 0 or 1, got 0\.5"):
        Plan(**table | {"b": [0.5]}, adaptive=[0.5])


def test_history_that_was_not_stored_or_must_diverge_is_refused():
    table = {"level": [0] * 3, "sigma": [1.0] * 3, "a": [1] * 3, "b": [0.1] * 3, "c": [0] * 3}
    with pytest.raises(ValueError, match=r"d\[1\] = 0.5 uses previous, which no row before it stores"):
        Plan(**table, d=[0, 0.5, 0], e=[0, 1, 0])
    assert Plan(**table, d=[0, 0.5, 0], e=[1, 0, 0]).stores.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="must diverge: data at one point"):
        Plan(**table, d=[0, 200, 0], e=[1, 0, 0])


def network(levels, cls=NCSN, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"divide_by_sigma": True} | options if cls is NCSN else options
        return cls(levels, channels=1, ngf=4, image_size=8, **options).eval()


@pytest.mark.parametrize("sampler", [heun, dpm_solver_2m, sde_dpm_solver_2m, predictor_corrector])
@pytest.mark.parametrize("executor", ["native", "graph"])
def test_executors_agree(sampler, executor):
    from tests.fake_graphs import FakeGraphs

    plan = sampler(SIGMAS)
    net = network(plan.sigmas)
    eager, other = (
        Engine(net, 4, executor="eager"),
        Engine(net, 4, executor="eager" if executor == "graph" else executor),
    )
    if executor == "graph":
        other._bind(GraphExecutor(FakeGraphs()))
    first = annealed_langevin(SIGMAS, 2, 1e-3)
    for p in (first, plan, first):  # a plan with history between two without
        got, want = other.sample(6, 1, p), eager.sample(6, 1, p)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_slots_at_different_rows_keep_their_own_history():
    """Six chains through slots that are refilled at different times equal each chain alone."""
    plan = dpm_solver_2m(SIGMAS)
    engine = Engine(mixture.model(plan.sigmas), 4, sigmas=plan.sigmas, shape=SHAPE)
    together = engine.sample(6, SEED, plan)
    for i in (0, 5):
        alone = Engine(mixture.model(plan.sigmas), 1, sigmas=plan.sigmas, shape=SHAPE).sample(1, SEED, plan, i)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_schedules(name):
    sigmas = schedule.SCHEDULES[name](80, 0.002, 18)
    assert len(sigmas) == 18 and sigmas[0] == 80 and sigmas[-1] == pytest.approx(0.002) and (np.diff(sigmas) < 0).all()
    with pytest.raises(ValueError, match=f"{name} needs 0 < sigma_min"):
        schedule.SCHEDULES[name](1, 2, 5)


def test_schedules_are_the_published_ones():
    np.testing.assert_allclose(karras(80, 0.002, 18)[[1, 9]], [57.586, 1.9233], rtol=1e-4)  # EDM, by its eq. 5
    angles = np.arctan(schedule.cosine(10, 0.1, 9))
    np.testing.assert_allclose(np.diff(angles), np.diff(angles[[0, -1]])[0] / 8)
    assert len(schedule.ncsnv2(50, 0.01, 3072)) == pytest.approx(232, rel=0.07)  # its authors use 232
    assert len(schedule.ncsnv2(90, 0.01, 3 * 64 * 64)) == pytest.approx(500, rel=0.07)


@pytest.mark.parametrize("name", SAMPLERS)
def test_plans_of_a_number_of_evaluations(name):
    options = {"steps_per_level": 2, "step_lr": 1e-5} if name == "annealed_langevin" else {}
    assert plan_of_nfe(name, 35, 10, 0.01, "geometric", **options).nfe == 35


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: plan_of_nfe("heun", 36, 1, 0.1), "heun .* not 36; take 35 or 37"),
        (lambda: plan_of_nfe("rk45", 36, 1, 0.1), "sampler must be one of .* got 'rk45'"),
        (lambda: plan_of_nfe("heun", 35, 1, 0.1, "sine"), "schedule must be one of .* got 'sine'"),
        (lambda: plan_of_nfe("euler", 1, 1, 0.1), "take 2"),
        (lambda: predictor_corrector(SIGMAS, predictor="euler"), "predictor must be"),
        (lambda: sa_solver(SIGMAS, -0.1), "tau must be >= 0 and finite, got -0.1"),
        (lambda: ddim(SIGMAS, 1.5), r"eta must lie in \[0, 1\], got 1.5"),
    ],
)
def test_what_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_version_1_files_are_read():
    import json

    plan = annealed_langevin(SIGMAS, 2, 1e-3)
    content = json.loads(plan.to_json()) | {"version": 1}
    old = {k: v for k, v in content.items() if k not in ("e", "f", "adaptive")}
    assert Plan.from_json(json.dumps(old)) == plan
    with pytest.raises(ValueError, match="unknown"):
        Plan.from_json(json.dumps(content))


def test_on_levels_is_exact_at_levels_and_the_denoiser_between():
    assert heun(SIGMAS).on_levels(SIGMAS) == heun(SIGMAS)
    plan = dpm_solver_2m(karras(4, 0.1, 12)).on_levels(SIGMAS)
    assert np.isin(plan.sigma, SIGMAS).all()
    np.testing.assert_allclose(plan.f[:-2], plan.sigma[:-2] ** 2)  # x + σ_l²·score_l: the level's own denoised image
    Engine(mixture.model(SIGMAS), 2, sigmas=SIGMAS, shape=SHAPE).sample(1, plan=plan)


def test_the_engine_says_how_to_have_other_sigmas():
    with pytest.raises(ValueError, match=r"plan.on_levels\(model.sigmas\), or an Engine of at_sigmas"):
        drawn_with = Engine(mixture.model(SIGMAS), 2, sigmas=SIGMAS, shape=SHAPE)
        drawn_with.sample(1, plan=heun(karras(4, 0.1, 12)))


def test_ncsn_between_its_levels():
    trained = geometric(1, 0.1, 4)
    net = network(trained)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    middle = np.sqrt(trained[1] * trained[2])
    other = at_sigmas(net, [trained[0], trained[1], middle, trained[3]])
    with torch.no_grad():
        level = torch.tensor([1, 3])
        assert torch.equal(other(x, level), net(x, level))
        ends = [net(x, torch.full((2,), i)) * trained[i] for i in (1, 2)]
        found = other(x, torch.full((2,), 2)) * middle
    assert 0.1 < (found - ends[0]).norm() / (ends[1] - ends[0]).norm() < 0.9  # between them
    assert other.end_conv.weight is net.end_conv.weight and other.sigmas.tolist()[2] == pytest.approx(middle)
    with pytest.raises(ValueError, match=r"sigmas\[0\] = 1.2 lies outside the model's levels, 1 to 0.1"):
        at_sigmas(net, [1.2, 0.5])


def test_conditioning_that_is_exact():
    v2 = network(geometric(1, 0.1, 4), NCSNv2)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        found = at_sigmas(v2, [0.5, 0.3])(x, torch.tensor([0, 1]))
        want = v2(x, torch.tensor([0, 0])) / torch.tensor([0.5, 0.3])[:, None, None, None]
    torch.testing.assert_close(found, want)
    told = as_score(lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2), "denoiser", sigmas=[1.0, 0.5])
    torch.testing.assert_close(at_sigmas(told, [0.7])(x, torch.tensor([0, 0])), -x / 1.49)
    with pytest.raises(ValueError, match="told whole numbers"):
        at_sigmas(as_score(lambda x, level: x, "score", sigmas=[1.0]), [0.7])
    with pytest.raises(ValueError, match="function cannot be asked between its levels"):
        at_sigmas(lambda x, level: x, [0.7])
