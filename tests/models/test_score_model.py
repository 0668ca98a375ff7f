"""Every kind of prediction, from the exact answer for a Gaussian mixture, gives the mixture's score."""

import math

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.models.score_model import KINDS, as_score
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.plans.samplers import heun
from sgm_engine.plans.schedule import karras

MEANS, SPREAD = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64), 0.3
SIGMAS = torch.logspace(1, -2, 12, dtype=torch.float64)


def denoised(x, sigma):
    """E[data | x] where every pixel is an independent mixture of three Gaussians of equal weight. float64."""
    x, sigma = x.double()[..., None], sigma.double().reshape(-1, 1, 1, 1, 1)
    variance = SPREAD**2 + sigma**2
    weight = torch.softmax(-((x - MEANS) ** 2) / (2 * variance), dim=-1)
    return (weight * (MEANS + SPREAD**2 / variance * (x - MEANS))).sum(-1)


def network(kind, told):
    """What a perfectly trained network of this kind returns; ``told`` turns its condition into sigma."""

    def call(x, condition):
        sigma = told(condition)
        s = sigma.double()[:, None, None, None]
        root = torch.sqrt(1 + s**2)
        scale = {"vp_noise_prediction": root, "vp_denoiser": root, "v_prediction": root, "flow": 1 + s,
                 "edm": torch.sqrt(0.25 + s**2)}.get(kind, torch.ones_like(s))  # fmt: skip
        x = x.double() * scale  # back to data + σ·noise
        d = denoised(x, sigma)
        noise = (x - d) / s
        answers = {
            "score": -noise / s,
            "denoiser": d,
            "noise_prediction": noise,
            "vp_noise_prediction": noise,
            "vp_denoiser": d,
            "v_prediction": (noise - s * d) / root,
            "edm": (d - 0.25 / (0.25 + s**2) * x) / (s * 0.5 / torch.sqrt(0.25 + s**2)),
            "flow": noise - d,
        }
        return answers[kind].float()

    return call


ALPHAS = 1 / (1 + SIGMAS.flip(0) ** 2)  # timestep 0 is the cleanest
TOLD = {
    "level": lambda c: SIGMAS[c],
    "sigma": lambda c: c,
    "timestep": lambda c: SIGMAS.flip(0)[c],
    "c_noise": lambda c: torch.exp(4 * c.double()),
    "flow_time": lambda c: c.double() / (1 - c.double()),
    "log_sigma": lambda c: torch.exp(c.double()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_score(kind):
    default = KINDS[kind](SIGMAS.numpy(), 0.5).condition
    levels = {"alphas_cumprod": ALPHAS} if default == "timestep" else {"sigmas": SIGMAS}
    score = as_score(network(kind, TOLD[default]), kind, **levels)
    torch.testing.assert_close(score.sigmas.double(), SIGMAS, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    level = torch.arange(12)
    noise = torch.randn(12, 2, 3, 3, generator=generator, dtype=torch.float64)
    x = (0.3 + SIGMAS[:, None, None, None] * noise).float()
    expected = (denoised(x, SIGMAS) - x.double()) / SIGMAS[:, None, None, None] ** 2
    found = score(x, level)
    assert found.dtype == torch.float32
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # Where D ≈ x, float32 networks of the denoising kinds cannot say more: an error of D of 2^-24 is one of 2^-24/σ².
    assert error[:8].max() < 2e-5 and error.max() < 2e-2


@pytest.mark.parametrize("condition", ["level", "sigma", "log_sigma", "c_noise"])
def test_the_condition_can_be_another(condition):
    score = as_score(network("noise_prediction", TOLD[condition]), "noise_prediction", SIGMAS, condition)
    x = torch.full((3, 1, 1, 1), 0.7)
    expected = (denoised(x, SIGMAS[:3]) - x) / SIGMAS[:3, None, None, None] ** 2
    torch.testing.assert_close(score(x, torch.arange(3)).double(), expected.double(), rtol=1e-4, atol=1e-7)


def test_timesteps_choose_levels():
    score = as_score(
        network("vp_denoiser", TOLD["timestep"]), "vp_denoiser", alphas_cumprod=ALPHAS, timesteps=[11, 5, 0]
    )
    torch.testing.assert_close(score.sigmas.double(), SIGMAS[[0, 6, 11]], rtol=1e-6, atol=0)
    assert score.condition.tolist() == [11, 5, 0] and score.condition.dtype == torch.int64


def test_a_generic_denoiser_in_the_engine():
    """A module that nothing is known of, sampled by the engine; exact law of the Gaussian that it denoises."""

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor(0.25))

        def forward(self, x, sigma):
            v = sigma[:, None, None, None] ** 2
            return (x * 0.04 + self.mean * v) / (0.04 + v)

    model = Denoiser()
    score = as_score(model, "denoiser", torch.logspace(0, -1, 6))
    assert next(score.parameters()) is model.mean
    plan = annealed_langevin(score.sigmas, steps_per_level=40, step_lr=2e-3, denoise=False)
    x = Engine(score, batch=64, shape=(1, 8, 8)).sample(64, plan=plan)
    variance = (0.04 + 0.01) / (1 - 0.002 / (2 * 0.05))  # s²/(1 − α/2s²) at the last level; 4,096 pixels
    assert abs(x.mean() - 0.25) < 5 * math.sqrt(variance / 4096)
    assert abs(x.var() / variance - 1) < 5 * math.sqrt(2 / 4096)
    with torch.no_grad():
        model.mean.add_(1.0)
    assert Engine(score, batch=64, shape=(1, 8, 8)).sample(64, plan=plan).mean() > 1.2


def test_a_score_model_is_passed_through_bit_for_bit():
    def f(x, level):
        return torch.sin(x) * (1 + level)[:, None, None, None]

    x, level = torch.rand(2, 1, 3, 3), torch.tensor([1, 0])
    assert torch.equal(as_score(f, sigmas=[1.0, 0.5])(x, level), f(x, level))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "epsilon"}, "kind must be one of score, denoiser"),
        ({"sigmas": None}, "sigmas: the model has none"),
        ({"sigmas": [0.1, 1.0]}, "sigmas must descend"),
        ({"condition": "time"}, "condition must be"),
        ({"kind": "vp_noise_prediction"}, "is told timesteps: pass alphas_cumprod"),
        ({"alphas_cumprod": [0.5], "timesteps": [0]}, "pass one of them"),
        ({"alphas_cumprod": [0.5, 0.3]}, "sigmas hold 0.5, and alphas_cumprod goes from 1 to 1.52"),
        ({"sigmas": None, "alphas_cumprod": [1.0, 0.5], "timesteps": [1, 0]}, "timesteps hold 0, where ᾱ is 1"),
        ({"condition": lambda sigmas: sigmas[:1]}, "one row for each of 2"),
        ({"given": {"y": torch.zeros(2)}}, r"given\['y'\] must be a tensor \[1, …\]"),
        ({"sigmas": None, "alphas_cumprod": [0.5, 1.5]}, "alphas_cumprod must be"),
        ({"sigmas": None, "alphas_cumprod": [0.9, 0.5], "timesteps": [2]}, "timesteps must be integers from 0 to 1"),
        ({"timesteps": [0]}, "timesteps index alphas_cumprod"),
        ({"kind": "edm", "sigma_data": 0.0}, "sigma_data must be positive"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        as_score(lambda x, c: x, **({"sigmas": [1.0, 0.5]} | options))
    with pytest.raises(TypeError, match="model must be callable"):
        as_score("model", sigmas=[1.0])
    with pytest.raises(ValueError, match="model must return a tensor of x's shape"):
        as_score(lambda x, c: x[:, :1], sigmas=[1.0])(torch.zeros(1, 2, 3, 3), torch.tensor([0]))


def test_a_function_of_the_sigmas_is_told():
    score = as_score(network("noise_prediction", lambda c: c[:, 0]), "noise_prediction", SIGMAS, lambda s: s[:, None])
    x = torch.full((3, 1, 1, 1), 0.7)
    expected = (denoised(x, SIGMAS[:3]) - x) / SIGMAS[:3, None, None, None] ** 2
    torch.testing.assert_close(score(x, torch.arange(3)).double(), expected.double(), rtol=1e-4, atol=1e-7)


def test_a_ddpm_between_its_timesteps():
    """Told the timestep where its σ would be, so that any sampler's sigmas can be asked for; whole ones stay whole."""
    between = {}

    def told(c):
        between["c"] = c
        return torch.exp(
            torch.lerp(SIGMAS.flip(0).log()[c.long()], SIGMAS.flip(0).log()[c.ceil().long()], c.double() % 1)
        )

    score = as_score(network("vp_noise_prediction", told), "vp_noise_prediction", alphas_cumprod=ALPHAS)
    other = at_sigmas(score, heun(karras(9.0, 0.02, 5)).sigmas)
    assert other.condition.is_floating_point() and at_sigmas(score, SIGMAS[2:4]).condition.tolist() == [9, 8]
    sigma, level = torch.tensor(karras(9.0, 0.02, 5)), torch.arange(5)
    x = torch.linspace(-2, 2, 5)[:, None, None, None] * sigma.float()[:, None, None, None]
    expected = (denoised(x, sigma) - x.double()) / sigma[:, None, None, None] ** 2
    torch.testing.assert_close(other(x, level).double(), expected, rtol=2e-3, atol=1e-6)
    assert between["c"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"sigmas hold 20, and alphas_cumprod goes from 0\.01 to 10"):
        at_sigmas(score, [20.0, 1.0])


def test_a_schedule_that_starts_without_noise_and_one_that_ends_in_rounding():
    f = network("vp_noise_prediction", TOLD["timestep"])
    assert as_score(f, "vp_noise_prediction", alphas_cumprod=[1.0, 0.9, 0.5]).condition.tolist() == [2, 1]
    with pytest.warns(UserWarning, match=r"ends at 3e-07, so that the noisiest level is σ = 1,826 .*from 1 down"):
        as_score(f, "vp_noise_prediction", alphas_cumprod=[0.9, 0.5, 3e-7])


class Output:
    def __init__(self, sample):
        self.sample = sample


def test_what_networks_return_and_take_besides():
    class Labelled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x, t, y, mask, scale=1):
            out = self.drop(x) * y[:, None, None, None] * mask * scale
            return Output(torch.cat([out, 7 * out], dim=1))

    net, x = Labelled().eval(), torch.rand(3, 2, 4, 4)
    mask = torch.rand(1, 1, 4, 4)
    given = {"y": 5, "mask": mask, "scale": 2.0}
    score = as_score(net, sigmas=[1.0, 0.5], given=given, learned_variance=True)
    torch.testing.assert_close(score(x, torch.tensor([0, 1, 0])), 10 * x * mask)
    assert (
        not net.drop.training
        and at_sigmas(as_score(net, "denoiser", [1.0], given=given), [0.5]).given.keys() == given.keys()
    )
    with pytest.raises(ValueError, match=r"got \[3, 4, 4, 4\]: if the second half .* pass learned_variance=True"):
        as_score(net, sigmas=[1.0], given=given)(x, torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="is for networks of twice x's channels"):
        as_score(lambda x, t: x, sigmas=[1.0], learned_variance=True)(x, torch.tensor([0, 0, 0]))


def test_dropout_of_a_wrapped_network_stays_off():
    net = torch.nn.Sequential(torch.nn.Dropout(0.5)).eval()
    wrapped = torch.nn.Module()  # in training mode, as a class that only passes on is made
    wrapped.net, wrapped.forward = net, lambda x, t: net(x)
    assert wrapped.training and as_score(wrapped, sigmas=[1.0]) and not net.training and not net[0].training


def test_a_learned_variance_is_refused_when_the_engine_is_made():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x, t):
            return self.conv(x)

    with pytest.raises(ValueError, match="pass learned_variance=True"):
        Engine(as_score(Twice(), sigmas=[1.0]), 2, shape=(3, 8, 8))
    assert Engine(as_score(Twice(), sigmas=[1.0], learned_variance=True), 2, shape=(3, 8, 8)).executor == "native"


def test_a_ddpm_is_sampled_in_a_few_steps_unless_told_otherwise():
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    score = as_score(lambda x, t: x, "vp_noise_prediction", alphas_cumprod=alphas)
    plan = Engine(score, 2, shape=(1, 2, 2)).default_plan
    assert plan.nfe == 30 and plan.sigma[0] == score.sigmas[0].double() and plan.level[-1] == 999
