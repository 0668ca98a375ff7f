"""Score-matching objectives: pure functions (model, x, levels, key) → loss, the mean over the batch.

model(x [N, …], level [N]) → score like x, with ``model.sigmas`` [L]; x: clean data [N, …], any number of dimensions;
levels: int64 [N]; key: where the noise comes from (keys.Key), draws 0, 1, …. x̃ = x + σ·z, z = draw 0. Sums run over a
sample's elements. Every objective but the denoising autoencoder carries λ(σ) = σ², so that levels weigh alike
(NCSN, arXiv 1907.05600, section 4.2). Options are keyword arguments, to be set with functools.partial; every objective
takes reduction="none", which returns the losses of the samples, [N].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from sgm_engine.keys import Key
from sgm_engine.training.cdm_objective import cdm

Model = Callable[[Tensor, Tensor], Tensor]


def _reduced(per_sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(per_sample)
    def objective(*args, reduction: str = "mean", **options) -> Tensor:
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        losses = per_sample(*args, **options)
        return losses.mean() if reduction == "mean" else losses

    return objective


@_reduced
def denoising(model: Model, x: Tensor, levels: Tensor, key: Key) -> Tensor:
    """½·σ²·‖s(x̃) + z/σ‖² (NCSN, eqs. 5–6; Vincent 2011, eq. 11)."""
    sigma, z = _sigma(model, x, levels), key.normal(x)
    return 0.5 * _square(sigma * _score(model, x + sigma * z, levels) + z)


@_reduced
def explicit(model: Model, x: Tensor, levels: Tensor, key: Key, *, score: Model) -> Tensor:
    """½·σ²·‖s(x̃) − ∇log q_σ(x̃)‖² against the known ``score(x̃, levels)`` (Hyvärinen 2005, eq. 2)."""
    sigma = _sigma(model, x, levels)
    x_noisy = x + sigma * key.normal(x)
    return 0.5 * _square(sigma * (_score(model, x_noisy, levels) - score(x_noisy, levels)))


@_reduced
def implicit(model: Model, x: Tensor, levels: Tensor, key: Key) -> Tensor:
    """σ²·(½‖s(x̃)‖² + tr ∇s(x̃)), the trace exact: one backward pass for each dimension (Hyvärinen 2005, eq. 4)."""
    sigma = _sigma(model, x, levels)
    x_noisy = (x + sigma * key.normal(x)).requires_grad_()
    score = _score(model, x_noisy, levels)
    trace = x.new_zeros(len(x))
    for i, s in enumerate(score.flatten(1).unbind(1)):
        trace = trace + torch.autograd.grad(s.sum(), x_noisy, create_graph=True)[0].flatten(1)[:, i]
    return sigma.flatten() ** 2 * (0.5 * _square(score) + trace)


@_reduced
def sliced(
    model: Model, x: Tensor, levels: Tensor, key: Key, *, projections: int = 1, variance_reduced: bool = True
) -> Tensor:
    """σ²·(½‖s‖² + vᵀ∇s·v) at x̃, mean over ``projections`` of v ~ N(0, I) (arXiv 1905.07088, eq. 8; NCSN, eq. 3).

    variance_reduced False: ½(vᵀs)² for ½‖s‖² (eq. 7). Draw 1 + k is the k-th v.
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    sigma = _sigma(model, x, levels)
    x_noisy = (x + sigma * key.normal(x)).requires_grad_()
    score = _score(model, x_noisy, levels)
    total = 0.5 * _square(score) if variance_reduced else x.new_zeros(len(x))
    for k in range(projections):
        v = key.normal(x, 1 + k)
        along = _dot(v, score)
        (gradient,) = torch.autograd.grad(along.sum(), x_noisy, create_graph=True)
        total = total + (_dot(v, gradient) + (0 if variance_reduced else 0.5 * along**2)) / projections
    return sigma.flatten() ** 2 * total


@_reduced
def denoising_autoencoder(model: Model, x: Tensor, levels: Tensor, key: Key) -> Tensor:
    """‖x̃ + σ²·s(x̃) − x‖², the reconstruction error (Vincent 2011, eq. 7): 2σ² times ``denoising`` at each level."""
    sigma = _sigma(model, x, levels)
    x_noisy = x + sigma * key.normal(x)
    return _square(x_noisy + sigma**2 * _score(model, x_noisy, levels) - x)


@_reduced
def stable_target(model: Model, x: Tensor, levels: Tensor, key: Key, *, reference: Tensor | None = None) -> Tensor:
    """½·σ²·‖s(x̃) − (x̄ − x̃)/σ²‖² with x̄ = Σ_j softmax_j(−‖x̃ − x_j‖²/2σ²)·x_j (stable target field, arXiv 2302.00670).

    x_j: the batch itself, and ``reference`` [K, …] behind it if given. Biased by O(1/K), with less variance.
    """
    sigma = _sigma(model, x, levels)
    x_noisy = x + sigma * key.normal(x)
    target = posterior_mean(x_noisy, x if reference is None else torch.cat([x, reference]), sigma)
    return 0.5 * _square(sigma * _score(model, x_noisy, levels) - (target - x_noisy) / sigma)


@_reduced
def multi_sample(model: Model, x: Tensor, levels: Tensor, key: Key, *, copies: int) -> Tensor:
    """½·M/σ²·‖x̂ − x‖² with x̂ = model(ys, levels) from M ``copies`` y_m = x + σ·z_m stacked as channels [N, M·C, …].

    The model predicts the clean x (Tweedie), not a score; ``multisample.score`` turns x̂ into one, at noise σ/√M, and
    this is its denoising loss there. Draw m is z_m.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    sigma = _sigma(model, x, levels)
    ys = torch.cat([x + sigma * key.normal(x, m) for m in range(copies)], 1)
    return 0.5 * copies * _square((model(ys, levels).to(x.dtype) - x) / sigma)


@_reduced
def edm(denoiser: Model, x: Tensor, sigma: Tensor, key: Key, *, sigma_data: float = 0.5) -> Tensor:
    """λ(σ)·‖D(x̃, σ) − x‖², λ = (σ² + σ_d²)/(σ·σ_d)² (EDM, arXiv 2206.00364, eq. 2 and table 1), for continuous σ [N].

    denoiser(x̃, sigma [N]) → denoised; ``lognormal_sigma`` draws σ as EDM does.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    s = _expand(sigma.to(x.dtype), x)
    weight = (s**2 + sigma_data**2).sqrt() / (s * sigma_data)
    return _square(weight * (denoiser(x + s * key.normal(x), sigma).to(x.dtype) - x))


def lognormal_sigma(key: Key, draw: int = 0, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """exp(mean + std·z), float32 [N]: EDM's noise levels (table 1, for images in [−1, 1])."""
    return (mean + std * key.normal(torch.empty(len(key.sample_id), 1), draw)[:, 0]).exp()


def posterior_mean(x_noisy: Tensor, candidates: Tensor, sigma: Tensor) -> Tensor:
    """E[x | x̃] if x were uniform on ``candidates`` [K, …]; x_noisy [N, …], sigma [N, 1, …] → like x_noisy."""
    y, c = x_noisy.flatten(1), candidates.flatten(1)
    # ‖y − x_j‖² by differences from one candidate: ‖y‖² cancels in the softmax, and large means lose no digits.
    origin = c[:1]
    logits = ((y - origin) @ (c - origin).T - 0.5 * _square(c - origin)) / sigma.flatten()[:, None] ** 2
    return (logits.softmax(1) @ c).view_as(x_noisy)


def _score(model: Model, x_noisy: Tensor, levels: Tensor) -> Tensor:
    return model(x_noisy, levels).to(x_noisy.dtype)


def _sigma(model: Model, x: Tensor, levels: Tensor) -> Tensor:
    """σ of each sample, [N, 1, …] as x."""
    return _expand(model.sigmas.to(x.dtype)[levels], x)


def _expand(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *[1] * (x.dim() - 1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[N, …], [N, …] → [N]."""
    return (a * b).flatten(1).sum(1)


def _square(a: Tensor) -> Tensor:
    return _dot(a, a)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (denoising, implicit, sliced, denoising_autoencoder, stable_target, cdm)
}  # those that need nothing but a network (cdm: a CDM, the others: a score network) and data
