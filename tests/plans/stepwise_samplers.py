"""What the tests of samplers share."""

from itertools import pairwise

import numpy as np
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.kernels import noise
from sgm_engine.plans.plan import ancestral, annealed_langevin, consistent_annealed, ddim, reverse_diffusion
from sgm_engine.plans.samplers import (
    dpm_solver_2m,
    euler,
    heun,
    predictor_corrector,
    sa_solver,
    sde_dpm_solver_2m,
)
from sgm_engine.plans.schedule import karras
from tests import mixture

SIGMAS = karras(4, 0.1, 7)


SHAPE, N, SEED = (2, 4, 4), 3, 5


def z(draw):
    fill = noise.fill((N, *SHAPE), np.full(N, SEED), np.arange(N), draw, 0, "normal")
    return torch.from_numpy(fill).double()


def denoise(x, sigma):
    return x + sigma**2 * mixture.score(x, sigma)


def churned(sigma, churn, count):
    raised = sigma * (1 + min(churn / count, np.sqrt(2) - 1))
    return raised, np.sqrt(raised**2 - sigma**2)


def by_euler(sigmas, churn=0.0, second_order=False):
    """EDM's algorithm 2 as it is written, on the noise that the engine draws: churn's is the row before."""
    _, extra = churned(sigmas[0], churn, len(sigmas))
    x, draw = np.hypot(sigmas[0], extra) * z(0), 0
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        raised, extra = churned(sigma, churn, len(sigmas))
        if i and extra:
            x = x + extra * z(draw)
        slope = (x - denoise(x, raised)) / raised
        guess = x + (after - raised) * slope
        if second_order:
            slope = (slope + (guess - denoise(guess, after)) / after) / 2
        x, draw = x + (after - raised) * slope, draw + (2 if second_order else 1)
    raised, extra = churned(sigmas[-1], churn, len(sigmas))
    return denoise(x + extra * z(draw) if extra else x, raised)


def by_dpm_solver(sigmas, sde):
    """DPM-Solver++(2M) in its own words: half-log-SNR λ = −ln σ, D extrapolated to the middle of the step."""
    x, before, last = sigmas[0] * z(0), None, None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        d, h = denoise(x, sigma), np.log(sigma / after)
        middle = d if before is None else d + (d - before) * h / (2 * last)
        decay = np.exp(-2 * h) if sde else np.exp(-h)
        x = decay * x + (1 - decay) * middle
        if sde:
            x = x + after * np.sqrt(1 - np.exp(-2 * h)) * z(i + 1)
        before, last = d, h
    return denoise(x, sigmas[-1])


def by_sa_solver(sigmas, tau):
    """2309.05019, eq. 14 with a τ that is constant: the line through the last two D, integrated numerically."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    x, before, last = sigmas[0] * z(0), None, None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        d, h = denoise(x, sigma), np.log(sigma / after)
        drift = 0.0
        for node, weight in zip(nodes, weights, strict=True):
            s = h * (1 + node) / 2
            line = d if before is None else d + (d - before) * s / last
            drift = drift + weight * h / 2 * (1 + tau**2) * np.exp((1 + tau**2) * (s - h)) * line
        noise_std = after * np.sqrt(1 - np.exp(-2 * tau**2 * h))
        x = after / sigma * np.exp(-(tau**2) * h) * x + drift + noise_std * z(i + 1)
        before, last = d, h
    return denoise(x, sigmas[-1])


def by_predictor_corrector(sigmas, steps, snr):
    x, draw = sigmas[0] * z(0), 0
    for sigma, after in pairwise(sigmas):
        draw, drop = draw + 1, sigma**2 - after**2
        x = x + drop * mixture.score(x, sigma) + np.sqrt(drop) * z(draw)
        for _ in range(steps):
            s, draw = mixture.score(x, after), draw + 1
            size = 2 * (snr * np.sqrt(s[0].numel()) / s.flatten(1).norm(dim=1)[:, None, None, None]) ** 2
            x = x + size * s + (2 * size).sqrt() * z(draw)
    return denoise(x, sigmas[-1])


def by_ddim(sigmas, eta):
    """DDIM-η in its own words: predicted noise re-used for what is left of σ' beside the fresh noise."""
    x = sigmas[0] * z(0)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        fresh = eta * after / sigma * np.sqrt(sigma**2 - after**2)
        d = denoise(x, sigma)
        x = d + np.sqrt(after**2 - fresh**2) * (x - d) / sigma + fresh * z(i + 1)
    return denoise(x, sigmas[-1])


def by_langevin(sigmas, steps, step_lr):
    """NCSN's algorithm 1 in the convention of its programs, and the denoising of NCSNv2."""
    x, draw = sigmas[0] * z(0), 0
    for sigma in sigmas:
        alpha = step_lr * (sigma / sigmas[-1]) ** 2
        for _ in range(steps):
            draw += 1
            x = x + alpha * mixture.score(x, sigma) + np.sqrt(2 * alpha) * z(draw)
    return denoise(x, sigmas[-1])


def by_consistent(sigmas, eta):
    """2009.05475, algorithm 2: part of the way to the denoised image, and noise until it is σ' again."""
    x = sigmas[0] * z(0)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        beta = np.sqrt(1 - ((1 - eta) * sigma / after) ** 2)
        x = (1 - eta) * x + eta * denoise(x, sigma) + beta * after * z(i + 1)
    return denoise(x, sigmas[-1])


def by_reverse_diffusion(sigmas, posterior):
    """2011.13456, eqs. 46 and 47: Euler–Maruyama, or with the noise of p(x' given x, D)."""
    x = sigmas[0] * z(0)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        drop = sigma**2 - after**2
        noise_std = after * np.sqrt(drop) / sigma if posterior else np.sqrt(drop)
        x = x + drop * mixture.score(x, sigma) + noise_std * z(i + 1)
    return denoise(x, sigmas[-1])


DEFINITIONS = {
    "annealed_langevin": (
        annealed_langevin(SIGMAS, 2, 2e-3, start="normal", start_scale=4),
        lambda: by_langevin(SIGMAS, 2, 2e-3),
    ),
    "consistent_annealed": (consistent_annealed(SIGMAS, eta=0.8), lambda: by_consistent(SIGMAS, 0.8)),
    "reverse_diffusion": (reverse_diffusion(SIGMAS), lambda: by_reverse_diffusion(SIGMAS, posterior=False)),
    "ancestral": (ancestral(SIGMAS), lambda: by_reverse_diffusion(SIGMAS, posterior=True)),
    "euler": (euler(SIGMAS), lambda: by_euler(SIGMAS)),
    "euler, churn": (euler(SIGMAS, s_churn=2), lambda: by_euler(SIGMAS, 2)),
    "heun": (heun(SIGMAS), lambda: by_euler(SIGMAS, second_order=True)),
    "heun, churn": (heun(SIGMAS, s_churn=1.5), lambda: by_euler(SIGMAS, 1.5, second_order=True)),
    "dpm_solver_2m": (dpm_solver_2m(SIGMAS), lambda: by_dpm_solver(SIGMAS, sde=False)),
    "sde_dpm_solver_2m": (sde_dpm_solver_2m(SIGMAS), lambda: by_dpm_solver(SIGMAS, sde=True)),
    "sa_solver": (sa_solver(SIGMAS), lambda: by_sa_solver(SIGMAS, 1)),
    "sa_solver, tau": (sa_solver(SIGMAS, 1.3), lambda: by_sa_solver(SIGMAS, 1.3)),
    "sa_solver, flow": (sa_solver(SIGMAS, 0), lambda: by_sa_solver(SIGMAS, 0)),
    "predictor_corrector": (predictor_corrector(SIGMAS, 2, 0.1), lambda: by_predictor_corrector(SIGMAS, 2, 0.1)),
    "ddim": (ddim(SIGMAS), lambda: by_ddim(SIGMAS, 0)),
    "ddim, eta": (ddim(SIGMAS, 0.6), lambda: by_ddim(SIGMAS, 0.6)),
}


def drawn(plan, batch=N):
    engine = Engine(mixture.model(plan.sigmas), batch, sigmas=plan.sigmas, shape=SHAPE)
    return engine.sample(N, SEED, plan).double()
