"""Exact laws through the real engine: what it draws must have the mean, variance and mode weight that mathematics says.

Statistics run on fixed seeds at 1e-6 a tail (4.9 standard errors). They alone would miss defects, so the same-noise
trace against float64 stands beside them, and the mutation gate shows that it notices each of a list of sampler defects.
"""

import dataclasses
import itertools
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.kernels import noise, ops
from sgm_engine.plans.plan import Plan, ancestral, annealed_langevin, consistent_annealed, ddim, reverse_diffusion
from sgm_engine.plans.schedule import geometric
from tests import stepwise

TAIL = 4.9  # standard errors of a two-sided test at 1e-6
NCSN = geometric(1, 0.01, 10)
NCSNV2_CIFAR = geometric(50, 0.01, 232)


def gaussian(sigmas, variance=0.0, mean=0.0):
    """The score of N(mean, variance) data at each level, as an engine's model and as stepwise's."""
    total = torch.tensor(sigmas, dtype=torch.float64) ** 2 + variance

    def score(x, level):
        v = total[level]
        return (mean - x) / (v.to(x.dtype)[:, None, None, None] if v.ndim else v.item())

    return score


def assert_law(x, mean, variance):
    """Sample mean and variance of x against the exact ones; normal tails bound those of a uniform start too."""
    x = x.double().flatten()
    n = len(x)
    assert abs(x.mean() - mean) <= TAIL * (variance / n) ** 0.5
    assert abs(x.var() / variance - 1) <= TAIL * (2 / n) ** 0.5


def draw(sigmas, plan, n=64, side=32, variance=0.0, mean=0.0, seed=1):
    return Engine(gaussian(sigmas, variance, mean), n, sigmas=sigmas, shape=(1, side, side)).sample(n, seed, plan)


# -- Langevin on a Gaussian: x ← x + α·s + √(2α)·z on N(0, s²) has ρ = 1 − α/s² ----------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 200])
@pytest.mark.parametrize("ratio", [0.02, 0.2, 0.9, 1.5])  # α/s²; 1.5 overshoots: ρ = −0.5
@pytest.mark.parametrize("convention", ["code", "paper"])
def test_langevin_on_a_gaussian(steps, ratio, convention):
    s2, ratio = 0.7**2, ratio
    step_lr = ratio * s2 * (2 if convention == "paper" else 1)
    plan = annealed_langevin([0.7], steps, step_lr, convention, denoise=False)
    rho = 1 - ratio
    stationary = s2 / (1 - ratio / 2)
    variance = rho ** (2 * steps) / 12 + stationary * (1 - rho ** (2 * steps))
    assert_law(draw([0.7], plan), 0.5 * rho**steps, variance)


@pytest.mark.parametrize(
    "sigmas, steps, step_lr, variance",
    [(NCSN, 100, 2e-5, 1.11111111e-4), (NCSNV2_CIFAR, 5, 6.2e-6, 1.12829923e-4)],
    ids=["NCSN", "NCSNv2-CIFAR"],
)
def test_published_settings(sigmas, steps, step_lr, variance):
    plan = annealed_langevin(sigmas, steps, step_lr, denoise=False)
    factor, exact = plan.a - plan.b / plan.sigma**2, 1 / 12
    for rho, c in zip(factor, plan.c, strict=True):
        exact = rho**2 * exact + c**2
    assert exact == pytest.approx(variance, rel=1e-8)
    x = draw(sigmas, plan, side=16)
    assert_law(x, 0.5 * factor.prod(), variance)
    denoised = draw(sigmas, annealed_langevin(sigmas, steps, step_lr), side=16)
    assert denoised.abs().max() < 1e-6  # all data is at 0


# -- few-step samplers on N(mean, v) data: their own recursions, written out ------------------------------------------


def law_of(sampler, sigmas, v, start):
    """(mean factor, variance) after the denoising row, from the sampler's definition; x − mean starts at ``start``."""
    factor, variance = 1.0, start
    for now, after in itertools.pairwise(sigmas):
        gain = now**2 / (v + now**2)  # D − x = −gain·(x − mean)
        if sampler is ddim:  # x' = D + (σ'/σ)·(x − D)
            rho, c2 = 1 - (1 - after / now) * gain, 0
        elif sampler is ancestral:  # posterior of x' between D and x
            weight = after**2 / now**2
            rho, c2 = weight + (1 - weight) * (1 - gain), after**2 * (now**2 - after**2) / now**2
        elif sampler is reverse_diffusion:
            rho, c2 = 1 - (now**2 - after**2) / (v + now**2), now**2 - after**2
        else:  # consistent, η = 1: x' = D + σ'·z
            rho, c2 = 1 - gain, after**2
        factor, variance = factor * rho, rho**2 * variance + c2
    last = v / (v + sigmas[-1] ** 2)
    return factor * last, last**2 * variance


@pytest.mark.parametrize("sampler", [consistent_annealed, ancestral, reverse_diffusion, ddim])
@pytest.mark.parametrize("levels", [2, 12])
def test_few_step_samplers(sampler, levels):
    sigmas, v, mean = geometric(3, 0.1, levels), 0.4, -0.3
    plan = sampler(sigmas, start_shift=0.2)
    assert plan.nfe == levels
    factor, variance = law_of(sampler, sigmas, v, start=9.0)
    assert_law(draw(sigmas, plan, variance=v, mean=mean), mean + factor * (0.2 - mean), variance)


@pytest.mark.parametrize("eta", [0.5, 0.8, 1.0, 1.2])
def test_consistent_annealing_keeps_the_noise_at_sigma(eta):
    """With all data in one point, x has exactly the next row's noise after every row, from the first to the last."""
    sigmas = geometric(2, 0.1, 6)
    plan = consistent_annealed(sigmas, steps_per_level=3, eta=eta)
    for rows in (1, 3, 10, plan.nfe - 1):
        head = Plan(*(getattr(plan, name)[:rows] for name in ("level", "sigma", "a", "b", "c", "d")), "normal", 2.0)
        assert_law(draw(sigmas, head, side=16), 0, plan.sigma[rows] ** 2)


# -- a mixture: annealing finds the weights of the modes, plain Langevin does not (NCSN, fig. 3) -----------------------


def mode_weight(sigmas, plan, at_sigma):
    """The share of 16,384 chains in the mode at (5, 5) of 1/5·N((−5, −5), I) + 4/5·N((5, 5), I)."""
    variance = 1 + torch.tensor(at_sigma, dtype=torch.float32) ** 2

    def score(x, level):
        v = variance[level][:, None, None, None]
        mode = 5 * torch.tanh((10 * x.sum((1, 2, 3), keepdim=True) / v + np.log(4)) / 2)  # 5·(P(+) − P(−))
        return (mode - x) / v

    plan = dataclasses.replace(plan, start_scale=16.0, start_shift=-8.0)
    x = Engine(score, 16384, sigmas=sigmas, shape=(1, 1, 2)).sample(16384, seed=0, plan=plan)
    return (x.sum((1, 2, 3)) > 0).double().mean().item()


def exact_weight(plan, variance):
    """The same of the chains' own law, by quadrature: across (1, 1)/√2, all that the weights depend on, in float64.

    variance: of a mode, at each row of the plan.
    """
    m, h = 50**0.5, 0.125
    s = np.arange(-112, 112 + h / 2, h)
    p = (8 * 2**0.5 - abs(s)).clip(0)  # the start, U[−8, 8]²
    for row in range(plan.nfe):
        if row == 0 or plan.level[row] != plan.level[row - 1]:
            score = (m * np.tanh((2 * m * s / variance[row] + np.log(4)) / 2) - s) / variance[row]
            kernel = np.exp(-((s[:, None] - s - plan.b[row] * score) ** 2) / (2 * plan.c[row] ** 2))
            kernel *= h / (plan.c[row] * np.sqrt(2 * np.pi))
        p = kernel @ p
    return (p[s > 0].sum() + p[s == 0].sum() / 2) / p.sum()


def test_mixture_weight_of_annealed_langevin():
    sigmas = geometric(20, 1, 10)
    plan = annealed_langevin(sigmas, 100, step_lr=0.1, convention="paper", denoise=False)
    exact = exact_weight(plan, 1 + plan.sigma**2)
    assert exact == pytest.approx(0.782756, abs=2e-6)
    assert exact_weight(plan, plan.sigma**2) == pytest.approx(0.782295, abs=2e-6)  # of modes of width σ
    assert abs(mode_weight(sigmas, plan, sigmas) - exact) <= 0.0158


def test_mixture_weight_of_plain_langevin():
    plan = annealed_langevin([1.0], 1000, step_lr=0.1, convention="paper", denoise=False)
    exact = exact_weight(plan, np.ones(plan.nfe))
    assert exact == pytest.approx(0.508952, abs=3e-5) and abs(mode_weight([1.0], plan, [0.0]) - exact) <= 0.0192


def test_the_example_prints_the_law_of_its_own_chains(tmp_path, monkeypatch, capsys):
    """NCSN's figure 3: each panel's weight within four standard errors of its law, each as wide as the data."""
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[train]'")
    monkeypatch.chdir(tmp_path), monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "21_toy_mixture.py"))
    lines = capsys.readouterr().out.splitlines()
    sigmas = geometric(20, 1, 10)
    plans = [annealed_langevin(s, n, 0.1, convention="paper", denoise=False) for s, n in (([1.0], 1000), (sigmas, 100))]
    exact = [0.8] + [exact_weight(plan, plan.sigma**2) for plan in plans]  # modes of width σ, 1 at the end: the data's
    for line, law in zip(lines, exact, strict=True):
        weight, said, error, width = (float(n) for n in re.findall(r"\d\.\d+", line))
        assert said == pytest.approx(law, abs=3e-5) and abs(weight - law) < 4 * error
        assert width == pytest.approx(1, abs=0.05)


# -- the same noise in float64, and the mutation gate ------------------------------------------------------------------

IDS = [3, 2**33 + 5, 7, 2**32 + 3]  # two differ in their high half alone
SHAPE, SEED = (2, 3, 5), 2**63 + 9
TRACES = {"short": (geometric(1, 0.1, 3), 2, 1e-3), "long": (geometric(1, 0.01, 10), 20, 2e-5)}


def assert_trace(sigmas, steps, step_lr, plan=None, model=None):
    """The engine's samples differ from the float64 chain by at most twice what eager float32 PyTorch does."""
    score = gaussian(sigmas, variance=0.3, mean=0.4)
    chain = (sigmas, steps, step_lr, SHAPE, IDS, SEED)
    exact, eager = stepwise.float64(score, *chain), stepwise.eager(score, *chain)
    engine = Engine(model or score, 4, sigmas=sigmas, shape=SHAPE)
    got = np.stack([x.numpy() for _, x in engine.stream(IDS, SEED, plan or annealed_langevin(sigmas, steps, step_lr))])
    assert np.abs(got - exact).max() <= 2 * np.abs(eager - exact).max() + 1e-7


@pytest.mark.parametrize("trace", TRACES)
def test_same_noise_trace(trace):
    assert_trace(*TRACES[trace])


def test_trace_with_the_update_of_the_gate(monkeypatch):
    """The control: without a defect, the NumPy update passes what every defect below must fail."""
    monkeypatch.setattr(ops, "langevin_update_", stepwise.update())
    assert_trace(*TRACES["short"])


@pytest.mark.parametrize("defect", stepwise.DEFECTS)
def test_gate_update(defect, monkeypatch):
    monkeypatch.setattr(ops, "langevin_update_", stepwise.update(defect))
    with pytest.raises(AssertionError):
        assert_trace(*TRACES["short"])


@pytest.mark.parametrize("draw, kind", [(0, "normal"), (1, "uniform")])
def test_gate_start(draw, kind, monkeypatch):
    def noise_fill_(out, seed, sample_id, _draw, stream, _kind):
        out.copy_(torch.from_numpy(noise.fill(out.shape, seed.numpy(), sample_id.numpy(), draw, stream, kind)))

    monkeypatch.setattr(ops, "noise_fill_", noise_fill_)
    with pytest.raises(AssertionError):
        assert_trace(*TRACES["short"])


def _table(sigmas, steps, step_lr, **changes):
    """The plan of a trace with columns replaced by functions of (α [R], σ [R], σ_L)."""
    plan = annealed_langevin(sigmas, steps, step_lr)
    alpha = step_lr * (plan.sigma / sigmas[-1]) ** 2
    columns = {
        name: np.append(f(alpha, plan.sigma, sigmas[-1])[:-1], getattr(plan, name)[-1]) for name, f in changes.items()
    }
    return dataclasses.replace(plan, **columns)


def _last_row(sigmas, steps, step_lr, **values):
    plan = annealed_langevin(sigmas, steps, step_lr)
    return dataclasses.replace(plan, **{name: np.append(getattr(plan, name)[:-1], v) for name, v in values.items()})


PLAN_DEFECTS = {
    "the paper's convention": lambda *t: annealed_langevin(*t, convention="paper"),
    "σ instead of σ²": lambda s, n, lr: _table(
        s, n, lr, b=lambda a, g, last: lr * g / last, c=lambda a, g, last: np.sqrt(2 * lr * g / last)
    ),
    "√2 missing": lambda *t: _table(*t, c=lambda a, g, last: np.sqrt(a)),
    "variance for standard deviation": lambda *t: _table(*t, c=lambda a, g, last: 2 * a),
    "step relative to the first sigma": lambda s, n, lr: _table(
        s, n, lr, b=lambda a, g, last: lr * (g / s[0]) ** 2, c=lambda a, g, last: np.sqrt(2 * lr) * g / s[0]
    ),
    "one step a level too few": lambda s, n, lr: annealed_langevin(s, n - 1, lr),
    "one step a level too many": lambda s, n, lr: annealed_langevin(s, n + 1, lr),
    "no denoising": lambda *t: annealed_langevin(*t, denoise=False),
    "noise on the last row": lambda *t: _last_row(*t, c=0.01),
    "half the denoising": lambda *t: _last_row(*t, b=t[0][-1] ** 2 / 2),
}


@pytest.mark.parametrize("defect", PLAN_DEFECTS)
def test_gate_plan(defect):
    with pytest.raises(AssertionError):
        assert_trace(*TRACES["short"], plan=PLAN_DEFECTS[defect](*TRACES["short"]))


@pytest.mark.parametrize(
    "wrong", [lambda level: (level + 1).clamp(max=2), lambda level: 2 - level, lambda level: level * 0]
)
def test_gate_level(wrong):
    """Off by one, upside down, and never advanced."""
    sigmas = TRACES["short"][0]
    score = gaussian(sigmas, variance=0.3, mean=0.4)
    with pytest.raises(AssertionError):
        assert_trace(*TRACES["short"], model=lambda x, level: score(x, wrong(level)))


def test_gate_stale_score():
    """The network's answer of the step before."""
    sigmas = TRACES["short"][0]
    score, last = gaussian(sigmas, variance=0.3, mean=0.4), [torch.zeros(4, *SHAPE)]

    def model(x, level):
        last.append(score(x, level))
        return last[-2]

    with pytest.raises(AssertionError):
        assert_trace(*TRACES["short"], model=model)
