"""Small problems with known answers: Gaussian mixtures, and a network for points in a few dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgm_engine.keys import Key
from sgm_engine.plans.schedule import check_sigmas


class Mixture:
    """Σ_k w_k·N(μ_k, s_k²·I) in D dimensions. weights [K] (normalised here), means [K, D], stds [K].

    Points may have any shape [N, …] with D elements; σ is a number or [N], the noise that has been added.
    """

    def __init__(self, weights: Sequence[float], means: Sequence[Sequence[float]], stds: Sequence[float]):
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        self.means, self.stds = torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64)
        if self.means.shape[:1] != self.weights.shape or self.stds.shape != self.weights.shape:
            shapes = [tuple(t.shape) for t in (self.weights, self.means, self.stds)]
            raise ValueError(f"weights [K], means [K, D], stds [K] must agree, got shapes {shapes}")
        if not (self.stds >= 0).all():
            raise ValueError(f"stds must be at least 0, got {self.stds.min().item():g}")

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def sample(self, key: Key) -> Tensor:
        """One point for each of the key's samples, float64 [N, D]; draws 0 and 1."""
        n = len(key.sample_id)
        u = key.uniform(torch.empty(n, 1))[:, 0].double()
        component = torch.searchsorted(self.weights.cumsum(0)[:-1], u, right=True)
        z = key.normal(torch.empty(n, self.dim), 1).double()
        return self.means[component] + self.stds[component, None] * z

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """log density of data + σ·noise, float64 [N]."""
        return self._joint(x, sigma)[0].logsumexp(1)

    def score(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """∇ₓ log density of data + σ·noise, like x."""
        logits, toward = self._joint(x, sigma)
        return (logits.softmax(1)[:, :, None] * toward).sum(1).view(x.shape).to(x.dtype)

    def denoised(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """E[data | data + σ·noise = x], like x."""
        variance = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x)).view(-1, *[1] * (x.dim() - 1)) ** 2
        return x + variance * self.score(x, sigma)

    def _joint(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """log w_k·N(x; …) [N, K] and (μ_k − x)/v_k [N, K, D]."""
        noise = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        variance = self.stds**2 + noise[:, None] ** 2  # [N, K]
        if not (variance > 0).all():
            raise ValueError(f"sigma must be positive where points have no width, got {noise.min().item():g}")
        difference = self.means - x.flatten(1).double()[:, None]
        exponent = -0.5 * difference.square().sum(2) / variance
        norm = 0.5 * self.dim * torch.log(2 * torch.pi * variance)
        return self.weights.log() + exponent - norm, difference / variance[:, :, None]


class ScoreMLP(nn.Module):
    """forward(x [N, …], level [N]) → score, for D-dimensional points in any shape, such as [N, 1, 1, D].

    score = −x/(σ² + σ_d²) + σ_d/(σ·√(σ² + σ_d²))·F(x/√(σ² + σ_d²), log σ): EDM's preconditioning (arXiv 2206.00364,
    table 1) of an MLP of two hidden SiLU layers; F = 0 would be right for N(0, σ_d²·I).
    """

    def __init__(self, sigmas, dim: int = 2, width: int = 64, sigma_data: float = 1.0, seed: int = 0):
        super().__init__()
        self.register_buffer("sigmas", torch.tensor(check_sigmas(sigmas), dtype=torch.float32))
        self.shape, self.sigma_data = (1, 1, dim), sigma_data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.at(x, self.sigmas[level])

    def at(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The score at any σ [N]."""
        flat, sigma = x.flatten(1), sigma[:, None].to(x.dtype)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        hidden = self.layers(torch.cat([flat / total, sigma.log() / 4], 1))
        return (self.sigma_data / (sigma * total) * hidden - flat / total**2).view(x.shape)


class EnergyMLP(ScoreMLP):
    """forward(x [N, …], level [N]) → E [N], for as_score(kind="energy"): −∇E has the preconditioning of ScoreMLP.

    E = ½‖x‖²/(σ² + σ_d²) − σ_d/σ·f(x/√(σ² + σ_d²), log σ), f the same MLP with one output.
    """

    def __init__(self, sigmas, dim: int = 2, width: int = 64, sigma_data: float = 1.0, seed: int = 0):
        super().__init__(sigmas, dim, width, sigma_data, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers[-1] = nn.Linear(width, 1)

    def at(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The energy at any σ [N]."""
        flat, sigma = x.flatten(1), sigma[:, None].to(x.dtype)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        f = self.layers(torch.cat([flat / total, sigma.log() / 4], 1))
        return (0.5 * (flat / total).square().sum(1, keepdim=True) - self.sigma_data / sigma * f)[:, 0]


TRIPLE = Mixture([0.2, 0.5, 0.3], [[-1, -0.5], [1, 0.8], [0.2, -1.2]], [0.15, 0.25, 0.4])


def gap(model: ScoreMLP, truth: Mixture, key: Key) -> float:
    """E σ²·‖s − ∇log q_σ‖² / E σ²·‖∇log q_σ‖² over all levels: 0 is perfect, 1 a network that answers 0."""
    x = truth.sample(key).float()
    levels = torch.arange(len(x)) % len(model.sigmas)
    sigma = model.sigmas[levels]
    noisy = x + sigma[:, None] * key.normal(x, 2)
    exact = truth.score(noisy, sigma)
    with torch.no_grad():
        wrong = model(noisy, levels) - exact
    weight = sigma[:, None] ** 2
    return ((weight * wrong**2).sum() / (weight * exact**2).sum()).item()
