"""Score-matching objectives: pure functions (model, x, levels, key) → loss, the mean over the batch.

model(x [N, …], level [N]) → score like x, with ``model.sigmas`` [L]; x: clean data [N, …], any number of dimensions;
levels: int64 [N]; key: where the noise comes from (keys.Key), draws 0, 1, …. x̃ = x + σ·z, z = draw 0. Sums run over a
sample's elements. Every objective but the denoising autoencoder carries λ(σ) = σ², so that levels weigh alike
(NCSN, arXiv 1907.05600, section 4.2). Options are keyword arguments, to be set with functools.partial; every objective
takes reduction="none", which returns the losses of the samples, [N]. ``anneal_power`` p makes λ(σ) = σ^p.

Noise, targets and losses are float32, or float64 where x is, whatever autocast or x's own precision say; only the
network computes as it is told to. A σ of 0 is refused, but by ``implicit`` and ``sliced`` with anneal_power=0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from sgm_engine.keys import Key
from sgm_engine.models.score_model import checked_score
from sgm_engine.training.cdm_objective import cdm, ddm

Model = Callable[[Tensor, Tensor], Tensor]


def _reduced(per_sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(per_sample)
    def objective(model, x: Tensor, *args, reduction: str = "mean", **options) -> Tensor:
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
        if x.is_floating_point() and x.dtype.itemsize < 4:
            model, x = _InOwnDtype(model, x.dtype), x.float()
        losses = per_sample(model, x, *args, **options)
        return losses.mean() if reduction == "mean" else losses

    return objective


class _InOwnDtype:
    """``model`` fed in ``dtype``, that of the data it came with, and answering in the objective's."""

    def __init__(self, model: Model, dtype: torch.dtype):
        self.model, self.dtype = model, dtype

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        return self.model(x.to(self.dtype), level)


@_reduced
def denoising(model: Model, x: Tensor, levels: Tensor, key: Key, *, anneal_power: float = 2.0) -> Tensor:
    """½·σ²·‖s(x̃) + z/σ‖² (NCSN, eqs. 5–6; Vincent 2011, eq. 11)."""
    sigma, z = _sigma(model, x, levels), key.normal(x)
    loss = 0.5 * _square(sigma * _answer(model, x + sigma * z, levels) + z)
    return sigma.flatten() ** (anneal_power - 2) * loss


@_reduced
def explicit(model: Model, x: Tensor, levels: Tensor, key: Key, *, score: Model, anneal_power: float = 2.0) -> Tensor:
    """½·σ²·‖s(x̃) − ∇log q_σ(x̃)‖² against the known ``score(x̃, levels)`` (Hyvärinen 2005, eq. 2)."""
    sigma = _sigma(model, x, levels)
    x_noisy = x + sigma * key.normal(x)
    loss = 0.5 * _square(sigma * (_answer(model, x_noisy, levels) - _answer(score, x_noisy, levels)))
    return sigma.flatten() ** (anneal_power - 2) * loss


@_reduced
def implicit(
    model: Model, x: Tensor, levels: Tensor, key: Key, *, anneal_power: float = 2.0, regularisation: float = 0.0
) -> Tensor:
    """σ²·(½‖s(x̃)‖² + tr ∇s(x̃)), the trace exact: one backward pass for each dimension (Hyvärinen 2005, eq. 4).

    regularisation λ adds λ·Σ_i (∂s_i/∂x_i)² inside the brackets (Kingma & LeCun 2010, eq. 10).
    """
    sigma = _sigma(model, x, levels, zero=anneal_power == 0)
    x_noisy = (x + sigma * key.normal(x)).requires_grad_()
    score = _answer(model, x_noisy, levels)
    total = 0.5 * _square(score)
    for i, s in enumerate(score.flatten(1).unbind(1)):
        slope = torch.autograd.grad(s.sum(), x_noisy, create_graph=True)[0].flatten(1)[:, i]
        total = total + slope + (regularisation * slope**2 if regularisation else 0)
    return sigma.flatten() ** anneal_power * total


@_reduced
def sliced(
    model: Model,
    x: Tensor,
    levels: Tensor,
    key: Key,
    *,
    projections: int = 1,
    variance_reduced: bool = True,
    directions: str = "normal",
    anneal_power: float = 2.0,
) -> Tensor:
    """σ²·(½‖s‖² + vᵀ∇s·v) at x̃, mean over ``projections`` of v (arXiv 1905.07088, eq. 8; NCSN, eq. 3).

    directions: "normal", v ~ N(0, I), or "rademacher", v of −1 and 1. Draw 1 + k is the k-th v.
    variance_reduced False: ½(vᵀs)² for ½‖s‖² (eq. 7).
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    if directions not in ("normal", "rademacher"):
        raise ValueError(f"directions must be 'normal' or 'rademacher', got {directions!r}")
    sigma = _sigma(model, x, levels, zero=anneal_power == 0)
    x_noisy = (x + sigma * key.normal(x)).requires_grad_()
    score = _answer(model, x_noisy, levels)
    total = 0.5 * _square(score) if variance_reduced else x.new_zeros(len(x))
    for k in range(projections):
        v = key.normal(x, 1 + k) if directions == "normal" else 2 * (key.uniform(x, 1 + k) >= 0.5).to(x.dtype) - 1
        along = _dot(v, score)
        (gradient,) = torch.autograd.grad(along.sum(), x_noisy, create_graph=True)
        total = total + (_dot(v, gradient) + (0 if variance_reduced else 0.5 * along**2)) / projections
    return sigma.flatten() ** anneal_power * total


@_reduced
def denoising_autoencoder(
    model: Model, x: Tensor, levels: Tensor, key: Key, *, corruption: str = "gaussian", share: float = 0.25
) -> Tensor:
    """‖x̃ + σ²·s(x̃) − x‖², the reconstruction error (Vincent 2011, eq. 7): 2σ² times ``denoising`` at each level.

    corruption: "gaussian"; "masking": a ``share`` of the elements is 0; "salt_and_pepper": such a share is one of the
    ends of ``model.data_range`` ([0, 1] if it has none), either as often (Vincent et al. 2010, section 3.3).
    """
    sigma = _sigma(model, x, levels)
    x_noisy = x + sigma * key.normal(x) if corruption == "gaussian" else _corrupted(model, x, key, corruption, share)
    return _square(x_noisy + sigma**2 * _answer(model, x_noisy, levels) - x)


def _corrupted(model: Model, x: Tensor, key: Key, corruption: str, share: float) -> Tensor:
    """x with a share of its elements replaced. Draws 0 (which) and 1 (by what)."""
    if corruption not in ("masking", "salt_and_pepper"):
        raise ValueError(f"corruption must be 'gaussian', 'masking' or 'salt_and_pepper', got {corruption!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if corruption == "masking":
        return torch.where(key.uniform(x) < share, 0, x)
    low, high = getattr(model, "data_range", (0.0, 1.0))
    return torch.where(key.uniform(x) < share, torch.where(key.uniform(x, 1) < 0.5, low, high).to(x.dtype), x)


@_reduced
def stable_target(
    model: Model,
    x: Tensor,
    levels: Tensor,
    key: Key,
    *,
    reference: Tensor | None = None,
    reference_only: bool = False,
    anneal_power: float = 2.0,
) -> Tensor:
    """½·σ²·‖s(x̃) − (x̄ − x̃)/σ²‖² with x̄ = Σ_j softmax_j(−‖x̃ − x_j‖²/2σ²)·x_j (stable target field, arXiv 2302.00670).

    x_j: the batch itself, and ``reference`` [K, …] behind it if given. If those are independent points of the data,
    x̄ is an unbiased estimate of E[x | x̃], with less variance than x: given x̃ and all x_j, x is each of them with the
    weight that the softmax gives it. It is biased where a point counts twice: a reference that holds the batch, such as
    the training set, is for reference_only=True, which leaves the batch out; with all of the set x̄ is then exact.
    A reference that holds the batch beside it is warned of.
    """
    if reference_only and reference is None:
        raise ValueError("reference_only=True needs a reference, got None")
    sigma = _sigma(model, x, levels)
    x_noisy = x + sigma * key.normal(x)
    candidates = [part for part in (None if reference_only else x, reference) if part is not None]
    if len(candidates) == 2 and (twice := _held(x, reference)):
        warnings.warn(
            f"reference holds {twice} of the batch's {len(x)} points, which count twice and bias the target: leave "
            "them out, or pass reference_only=True",
            stacklevel=3,
        )
    toward = posterior_mean(x_noisy, torch.cat([part.to(x) for part in candidates]), sigma) - x_noisy
    loss = 0.5 * _square(sigma * _answer(model, x_noisy, levels) - toward / sigma)
    return sigma.flatten() ** (anneal_power - 2) * loss


def _held(x: Tensor, reference: Tensor) -> int:
    """How many of the points x [N, …] are among reference [K, …], to the bit."""
    whole = torch.int64 if x.dtype == torch.float64 else torch.int32
    x, reference = (part.to(x).flatten(1).contiguous().view(whole) for part in (x, reference))
    known = set(reference.sum(1).tolist())  # few points pass: those are compared whole
    alike = [point for point, total in zip(x, x.sum(1).tolist(), strict=True) if total in known]
    return sum(bool((reference == point).all(1).any()) for point in alike)


@_reduced
def multi_sample(model: Model, x: Tensor, levels: Tensor, key: Key, *, copies: int | None = None) -> Tensor:
    """½·M/σ²·‖x̂ − x‖² with x̂ = model(ys, levels) from M ``copies`` y_m = x + σ·z_m stacked as channels [N, M·C, …].

    The model predicts the clean x (Tweedie), not a score; ``multisample.score`` turns x̂ into one, at noise σ/√M, and
    this is its denoising loss there. Draw m is z_m. copies None: ``model.copies``, as of models.multi_sample.
    """
    copies = getattr(model, "copies", 0) if copies is None else copies
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    sigma = _sigma(model, x, levels)
    ys = torch.cat([x + sigma * key.normal(x, m) for m in range(copies)], 1)
    return 0.5 * copies * _square((_answer(model, ys, levels, like=x) - x) / sigma)


@_reduced
def edm(denoiser: Model, x: Tensor, sigma: Tensor, key: Key, *, sigma_data: float = 0.5) -> Tensor:
    """λ(σ)·‖D(x̃, σ) − x‖², λ = (σ² + σ_d²)/(σ·σ_d)² (EDM, arXiv 2206.00364, eq. 2 and table 1), for continuous σ [N].

    denoiser(x̃, sigma [N]) → denoised; ``lognormal_sigma`` draws σ as EDM does.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    if not (sigma > 0).all():
        raise ValueError(f"sigma must be positive, got {sigma.min().item():g}")
    s = _expand(sigma.to(x.dtype), x)
    weight = (s**2 + sigma_data**2).sqrt() / (s * sigma_data)
    return _square(weight * (_answer(denoiser, x + s * key.normal(x), sigma) - x))


def lognormal_sigma(key: Key, draw: int = 0, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """exp(mean + std·z), float32 [N]: EDM's noise levels (table 1, for images in [−1, 1])."""
    return (mean + std * key.normal(torch.empty(len(key.sample_id), 1), draw)[:, 0]).exp()


def posterior_mean(x_noisy: Tensor, candidates: Tensor, sigma: Tensor) -> Tensor:
    """E[x | x̃] if x were uniform on ``candidates`` [K, …]; x_noisy [N, …], sigma [N, 1, …] → like x_noisy.

    Computed in float64, also under autocast.
    """
    with torch.autocast(x_noisy.device.type, enabled=False):
        y, c = x_noisy.flatten(1).double(), candidates.flatten(1).double()
        weight = _log_weights(y, c, sigma.flatten().double()).softmax(1)
        return (weight @ c).view_as(x_noisy).to(x_noisy.dtype)


def _log_weights(y: Tensor, c: Tensor, sigma: Tensor) -> Tensor:
    """−‖y − c_j‖²/2σ² up to a number of each row: float64 [N, K] of y [N, D], c [K, D], sigma [N]."""
    y, c = y - c[:1], c - c[:1]  # ‖y‖² cancels in a softmax, and large means lose no digits
    reach = c.norm(dim=1).max()
    rounding = 4 * torch.finfo(y.dtype).eps * reach * ((y.norm(dim=1) + reach) / sigma**2).max()
    if rounding < 1e-5:
        return (y @ c.T - 0.5 * _square(c)) / sigma[:, None] ** 2
    return torch.stack([-0.5 * _square(one - c) for one in y]) / sigma[:, None] ** 2


def _answer(model: Model, x: Tensor, levels: Tensor, like: Tensor | None = None) -> Tensor:
    """What the model says of x, in the dtype of x or ``like`` and of that very shape: another would be broadcast."""
    like = x if like is None else like
    return checked_score(model(x, levels), like).to(like.dtype)


def _sigma(model: Model, x: Tensor, levels: Tensor, zero: bool = False) -> Tensor:
    """σ of each sample, [N, 1, …] as x; ValueError unless all of the model's are positive (zero: or 0)."""
    sigmas = model.sigmas
    if not ((sigmas > 0) | (zero & (sigmas == 0))).all():
        remedy = "" if zero else "; for clean data take implicit or sliced with anneal_power=0"
        raise ValueError(f"model.sigmas must be positive, got {sigmas.min().item():g}{remedy}")
    return _expand(sigmas.to(x.dtype)[levels], x)


def _expand(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *[1] * (x.dim() - 1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[N, …], [N, …] → [N]."""
    return (a * b).flatten(1).sum(1)


def _square(a: Tensor) -> Tensor:
    return _dot(a, a)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (denoising, implicit, sliced, denoising_autoencoder, stable_target, multi_sample, cdm, ddm)
}  # those that need nothing but data and a network (cdm: a CDM, ddm: a DDM, multi_sample: a MultiSample)
