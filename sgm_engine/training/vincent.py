"""Score matching and denoising autoencoders (Vincent 2011) as code: his energy model, and expectations without noise.

    E(x) = −(⟨c, x⟩ − ½‖x‖² + Σ_j softplus(⟨W_j, x⟩ + b_j))/σ²
    ψ(x) = −∂E/∂x = (Wᵀ·sigmoid(Wx + b) + c − x)/σ²                 the score of p ∝ exp(−E)
    Wᵀ·sigmoid(Wx̃ + b) + c = x̃ + σ²·ψ(x̃)                         the reconstruction of an autoencoder, tied weights

q_σ is the data blurred: (1/n)·Σ_i N(x_i, σ²·I). For the objectives J without the factor σ² that the trainer's carry:

    J_DSM = J_DAE/(2σ⁴)        J_DSM = J_ESM + d/(2σ²) − C        J_ISM = J_ESM − C        C = ½·E‖∇log q_σ‖²

so all have the same gradient in θ = (W, b, c). ``Quadrature`` replaces their random noise by a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.plans.schedule import check_sigmas
from sgm_engine.training.toy import Mixture


class EnergyModel(nn.Module):
    """θ = (W [hidden, dim], b [L, hidden], c [L, dim]), float64; random, from ``seed``. One of Vincent's models at each
    of the levels ``sigma``, a number or descending, with W in common.

    Points are [N, …] of dim elements. A score network, and what ``mala`` takes (``log_q_and_score``).
    """

    def __init__(self, dim: int, hidden: int, sigma: float | Sequence[float], seed: int = 0):
        super().__init__()
        sigmas = check_sigmas([sigma] if isinstance(sigma, (int, float)) else sigma)
        self.shape = (1, 1, dim)
        generator = torch.Generator().manual_seed(seed)
        shapes = (hidden, dim), (len(sigmas), hidden), (len(sigmas), dim)
        self.W, self.b, self.c = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes
        )
        self.register_buffer("sigmas", torch.tensor(sigmas, dtype=torch.float64))

    def energy(self, x: Tensor, level: Tensor | int = 0) -> Tensor:
        """x [N, …] → E [N]."""
        x, c = x.flatten(1).to(self.W.dtype), self.c[level]
        hidden = F.softplus(x @ self.W.T + self.b[level]).sum(1)
        return -((x * c).sum(1) - 0.5 * x.square().sum(1) + hidden) / self.sigmas[level] ** 2

    def reconstruct(self, x: Tensor, level: Tensor | int = 0) -> Tensor:
        """x [N, …] → the autoencoder's output, like x."""
        flat = x.flatten(1).to(self.W.dtype)
        found = torch.sigmoid(flat @ self.W.T + self.b[level]) @ self.W + self.c[level]
        return found.view(x.shape).to(x.dtype)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """ψ(x), the score."""
        variance = self.sigmas[level].view(-1, *[1] * (x.dim() - 1)) ** 2
        return (self.reconstruct(x, level) - x) / variance.to(x.dtype)

    def log_q_and_score(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(−E(x) [N], ψ(x)): log q up to a number of each level."""
        return -self.energy(x, level), self(x, level)


class Quadrature:
    """Expectations over x̃ ~ q_σ, points [n, 2], on a grid: exact to rounding, since all integrands are smooth.

    The trapezoidal rule converges geometrically here; nodes lie σ/2 apart, out to 9σ beyond the points.
    """

    def __init__(self, points: Tensor, sigma: float):
        n, dim = points.shape
        self.sigma = sigma
        if dim != 2:
            raise ValueError(f"points must be [n, 2], got {tuple(points.shape)}")
        reach, step = points.abs().max().item() + 9 * sigma, sigma / 2
        axis = torch.arange(-reach, reach, step, dtype=torch.float64)
        nodes = torch.cartesian_prod(axis, axis)
        self.x = points.repeat_interleave(len(nodes), 0)  # [n·nodes, 2]
        self.z = (nodes.repeat(n, 1) - self.x) / sigma
        self.weight = (-0.5 * self.z.square().sum(1)).exp() * (step / sigma) ** 2 / (2 * torch.pi * n)
        self.truth = Mixture([1.0] * n, points.tolist(), [0.0] * n)  # with noise σ: q_σ

    def normal(self, like: Tensor, draw: int = 0) -> Tensor:
        """In a Key's place: the grid for draw 0; for draws 1 and 2 the directions √2·e₁, √2·e₂, whose mean vvᵀ is I."""
        if draw == 0:
            return self.z
        return (2**0.5 * torch.eye(2, dtype=like.dtype)[draw - 1]).expand_as(like)

    def expectation(self, objective: Callable[..., Tensor], model: EnergyModel, **options) -> Tensor:
        """E over q_σ of one of training.objectives, divided by the σ² that it carries."""
        levels = torch.zeros(len(self.x), dtype=torch.int64)
        losses = objective(model, self.x, levels, self, reduction="none", **options)
        return (self.weight * losses).sum() / model.sigmas[0] ** 2

    def score(self, x: Tensor, level: Tensor) -> Tensor:
        """∇log q_σ, for the explicit objective."""
        return self.truth.score(x, self.sigma)
