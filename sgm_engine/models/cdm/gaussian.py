"""The Gaussian with the data's own mean and covariance: every class's density before anything is trained."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.models.cdm.classes import NoiseClasses
from sgm_engine.numerics import unrounded


class GaussianBase(nn.Module):
    """forward(u [N, …] of D elements) → [N, T + 2]: log N(u; signal_t·μ, signal_t²·C + noise_t²·I) + D/2·log 2π.

    C = V·diag(λ)·Vᵀ: one basis serves all classes, whose variances in it are v = signal²·λ + noise². Buffers, float64:
    mean μ [D], log_variance log λ [D], basis V [D, D], orthonormal columns; ``fit`` sets them (before: N(0, I)).
    A file may round them: what is loaded is made orthonormal again, so it is a Gaussian whatever the rounding.
    """

    def __init__(self, dim: int, classes: NoiseClasses):
        super().__init__()
        for name in ("signal", "noise"):
            table = torch.tensor(getattr(classes, name), device="cpu")
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("log_variance", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("basis", torch.eye(dim, dtype=torch.float64))
        for name in ("precision", "shifted", "constant", "share", "centre", "missed"):
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_post_hook(_loaded)
        self.refresh()

    @torch.no_grad()
    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Take μ [D] and C [D, D], positive definite."""
        variance, basis = torch.linalg.eigh(covariance.double())
        if not variance[0] > 0:
            raise ValueError(f"covariance must be positive definite, its least eigenvalue is {variance[0]:g}")
        self.mean.copy_(mean), self.log_variance.copy_(variance.log()), self.basis.copy_(basis)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make what follows from mean, log_variance and basis."""
        if self.basis.device.type == "meta":
            return
        self.mean, self.log_variance = self.mean.double(), self.log_variance.double()
        self.basis = self.basis.double()
        self.basis.copy_(_orthonormal(self.basis))  # in place: who packed it goes by the tensor
        signal, noise = (v.to(self.basis) for v in (self.signal, self.noise))
        variance = signal**2 * self.log_variance.exp()[:, None] + noise**2  # [D, T + 2]
        mean = (signal - 1) * (self.basis.T @ self.mean)[:, None]  # of z = Vᵀ(u − μ)
        self.precision, self.shifted = 1 / variance, mean / variance
        self.constant = (mean * self.shifted + variance.log()).sum(0)
        least = torch.maximum(noise, noise[1])  # data itself as the class of the least noise
        self.share = least**2 / (signal**2 * self.log_variance.exp()[:, None] + least**2)  # of a variance that is noise
        self.centre = self.share * mean
        self.missed = 1 - self.share.mean(0)  # of the variance of ε, by its mean given u

    @unrounded
    def whiten(self, u: Tensor) -> Tensor:
        """z = Vᵀ(u − μ) [N, D] of u [N, …], in the dtype of u."""
        return (u.flatten(1) - self.mean.to(u.dtype)) @ self.basis.to(u.dtype)

    def log_densities(self, z: Tensor) -> Tensor:
        """[N, T + 2] of z [N, D], in float64: logits lie thousands apart, and their differences of 1e-3 matter."""
        z = z.double()
        square, cross = z.square() @ self.precision.double(), z @ self.shifted.double()
        return cross - 0.5 * (square + self.constant.double())

    @unrounded
    def noise_pred(self, z: Tensor, t: Tensor) -> Tensor:
        """E[ε | u, class t] [N, D] if data were this Gaussian; z of u, t [N]."""
        inner = z * self.precision.to(z.dtype).T[t] - self.shifted.to(z.dtype).T[t]
        return self.noise.to(z.dtype)[t][:, None] * (inner @ self.basis.to(z.dtype).T)

    def forward(self, u: Tensor) -> Tensor:
        return self.log_densities(self.whiten(u))


def image_moments(images: np.ndarray, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of scale·x + shift, x the dequantised pixels of uint8 [N, …], in [0, 1].

    The uniform noise of dequantisation adds scale²/(12·256²) to every variance, so none is 0.
    """
    flat = torch.from_numpy(np.array(images.reshape(len(images), -1)))
    total, product = 0.0, 0.0
    for part in flat.split(4096):
        part = part.double()
        total, product = total + part.sum(0), product + part.T @ part
    mean = total / len(flat)
    covariance = product / len(flat) - mean[:, None] * mean
    covariance = (covariance + covariance.T) / 2 + torch.eye(len(mean), dtype=torch.float64) / 12
    return scale * (mean + 0.5) / 256 + shift, covariance * (scale / 256) ** 2


def _orthonormal(basis: Tensor) -> Tensor:
    """The nearby basis of orthonormal columns, as by Gram and Schmidt; the same tensor where it is one already."""
    gram = basis.T @ basis
    error = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if error.abs().max() < 1e-13:
        return basis
    lower = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(lower, basis.T, upper=False).T.contiguous()


def _loaded(module: GaussianBase, _) -> None:
    module.refresh()
