"""The plan of a request that names none: it fits the model's range of σ, and it need not diverge."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm_engine import Engine, annealed_langevin, as_score, geometric, karras
from sgm_engine.engine.defaults import default_plan
from sgm_engine.integrations import k_diffusion
from sgm_engine.models.guidance import classifier_free, posterior, with_drift
from sgm_engine.models.inverse import LinearOperator, mask
from sgm_engine.models.score_model import KINDS
from sgm_engine.plans.report import propagate
from tests.engine.engines import gaussian

WIDE, SHAPE = geometric(80, 0.002, 40), (1, 2, 2)


def denoiser(x, sigma):
    """Of data at 0.3."""
    return torch.full_like(x, 0.3)


def wrapped(kind, sigmas=WIDE):
    alphas = {"alphas_cumprod": torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)}
    told = alphas if kind.startswith("v") else {"sigmas": sigmas}
    return as_score(lambda x, t: x, kind, **told)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "score"])
def test_a_predictor_gets_few_steps_over_its_whole_range(kind):
    score = wrapped(kind)
    for model in (score, with_drift(score, lambda x, s: 0 * x), classifier_free(score, score, 2.0)):
        plan = Engine(model, 2, shape=SHAPE).default_plan
        assert (plan.name, plan.nfe) == ("dpm_solver_2m", 30)
        assert plan.sigma[0] == pytest.approx(float(score.sigmas[0])) and plan.level[-1] == len(score.sigmas) - 1


def test_the_example_of_the_documentation_draws_its_data():
    x = Engine(as_score(denoiser, "denoiser", sigmas=WIDE), shape=(3, 32, 32)).sample(2)
    torch.testing.assert_close(x, torch.full_like(x, 0.3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sigmas", [[1.0, 0.01], WIDE, [1e-3, 1e-4], karras(80, 0.002, 7), [50.0], [0.3, 0.2999, 1e-6]])
@pytest.mark.parametrize("kind", ["score", "denoiser"])
def test_no_default_diverges(sigmas, kind):
    """Of one-point data the distance to it shrinks, and what noise is left is the last level's at most."""
    sigmas = np.asarray(sigmas, float)
    plan = default_plan(wrapped(kind, sigmas), sigmas)
    factor, std = propagate(plan)
    assert abs(factor[-1]) < 1e-3 * max(1, 1 / plan.start_scale) and std[-1] < 2 * sigmas[-1]
    assert k_diffusion.sample(denoiser, torch.zeros(1, *SHAPE), sigmas, disable=True, seed=0).isfinite().all()


def test_an_ncsn_keeps_its_own():
    for sigmas in (geometric(1, 0.01, 10), np.float32(geometric(50, 0.01, 232)), geometric(1, 0.1, 3)):
        plan = Engine(gaussian, sigmas=sigmas, shape=SHAPE).default_plan
        assert plan == annealed_langevin(sigmas, 100, 2e-5)


@pytest.mark.parametrize("norm", [1.0, 7.0])
@pytest.mark.parametrize("kind", ["score", "denoiser"])
def test_a_measurement_gets_langevin_steps_that_are_short_enough(kind, norm):
    """norm: of the operator; the score's curvature is then up to (1 + norm²)/σ²."""
    operator = mask(torch.ones(SHAPE, dtype=torch.bool), SHAPE)
    if norm != 1:
        operator = LinearOperator(lambda x: norm * x, SHAPE, lambda y: norm * y)
    sigmas = geometric(1, 0.01, 6)
    own = as_score(lambda x, level: -x / torch.tensor(sigmas, dtype=torch.float32)[level].square()[:, None, None, None],
        sigmas=sigmas) if kind == "score" else as_score(lambda x, s: 0 * x, kind, sigmas=sigmas)  # fmt: skip
    engine = Engine(posterior(own, operator, torch.zeros(1, *SHAPE)), 2, shape=SHAPE)
    assert engine.default_plan.name == "annealed_langevin"
    assert engine.sample(2).abs().max() < 0.1


@pytest.mark.parametrize("step", [0, 2.0, 2.5, float("nan")])
def test_adapters_name_their_own_step(step):
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match=f"step must lie between 0 and 2, .* got {step:g}"):
        k_diffusion.sample_ald(denoiser, x, [1.0, 0.1], step=step, disable=True)


def test_the_printed_example_runs():
    """docs/accelerate.md, as_score: as printed, with networks that it does not define."""
    page = (Path(__file__).parents[2] / "docs" / "accelerate.md").read_text()
    block = page.partition("## as_score\n")[2].partition("\n\n")[0]
    names = {
        "unet": lambda x, t: x,
        "denoiser": lambda x, s: -torch.ones_like(x),
        "alphas": torch.linspace(0.99, 0.01, 1000),
    }
    exec(textwrap.dedent(block), names)
    assert names["x"].shape == (64, 3, 32, 32) and names["pictures"].shape == (64, 32, 32, 3)
    assert (names["pictures"] == 0).all()
