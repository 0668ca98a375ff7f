"""Models made of models: a drift of one's own, guidance by a classifier or without, linear measurements, coordinates.

Each function takes a model, x [B, C, H, W] and level [B] → score, and returns one; an Engine runs it like any other,
with every plan. One condition serves a whole request.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.models.inverse import LinearOperator
from sgm_engine.plans.schedule import Sigmas, check_number, check_sigmas

Term = Callable[[Tensor, Tensor], Tensor]


class Guided(nn.Module):
    """forward(x [B, C, H, W], level [B]) → model's score + the sum of term(x, sigma [B, 1, 1, 1]).

    sigmas [L]: None takes the model's. curvature(sigma) → what the terms add to −∂score/∂x at most, if that is known:
    a plan whose steps are too long for it is refused.
    """

    def __init__(
        self, model: Callable, terms: list[Term], sigmas: Sigmas | None = None, curvature: Callable | None = None
    ):
        super().__init__()
        sigmas = getattr(model, "sigmas", None) if sigmas is None else sigmas
        if sigmas is None:
            raise ValueError("sigmas: the model has none of its own, so pass its noise levels, descending")
        for term in terms:
            if not callable(term):
                raise TypeError(f"a term must be callable as term(x, sigma), got {type(term).__name__}")
        self.model, self.terms, self.curvature = model, list(terms), curvature
        values = torch.tensor(check_sigmas(sigmas), dtype=torch.float32)
        device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
        self.register_buffer("sigmas", values if device is None else values.to(device), persistent=False)
        self.training = bool(getattr(model, "training", False))  # of this module alone: its parts stay as they are

    @property
    def shape(self):
        return getattr(self.model, "shape", None)

    @property
    def plan(self):
        return getattr(self.model, "plan", None)

    @property
    def data_range(self):
        return getattr(self.model, "data_range", None)

    @property
    def predicts(self):
        return getattr(self.model, "predicts", "score")

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        score, sigma = self.model(x, level).float(), self.sigmas[level][:, None, None, None]
        for term in self.terms:
            score = score + term(x, sigma)
        return score

    def at_sigmas(self, sigmas: Sigmas) -> Guided:
        return Guided(at_sigmas(self.model, sigmas), self.terms, sigmas, self.curvature)


def with_drift(model: Callable, extra: Term, sigmas: Sigmas | None = None) -> Guided:
    """score + extra(x [B, C, H, W], sigma [B, 1, 1, 1]), whatever that is."""
    return Guided(model, [extra], sigmas)


def classifier_guided(model: Callable, log_prob: Term, scale: float = 1.0, sigmas: Sigmas | None = None) -> Guided:
    """score + scale·∇ₓ log p(y | x, σ) (arXiv 2011.13456, eq. 14; 2105.05233): one gradient of log_prob a row.

    log_prob(x [B, C, H, W], sigma [B, 1, 1, 1]) → [B], of the y that is wanted, by a classifier that knows noise.
    scale 1 is Bayes' rule; any other is a heuristic.
    """
    scale = check_number("scale", scale)

    def term(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = log_prob(x, sigma)
            if value.shape != x.shape[:1]:
                raise ValueError(f"log_prob must return one value a sample, [{len(x)}], got {list(value.shape)}")
            return scale * torch.autograd.grad(value.sum(), x)[0]

    return Guided(model, [term], sigmas)


class ClassifierFree(nn.Module):
    """unconditional + weight·(conditional − unconditional): two evaluations a row."""

    def __init__(self, conditional: Callable, unconditional: Callable, weight: float, sigmas: Sigmas | None = None):
        super().__init__()
        sigmas = getattr(conditional, "sigmas", None) if sigmas is None else sigmas
        if sigmas is None:
            raise ValueError("sigmas: the conditional model has none of its own, so pass its noise levels, descending")
        self.conditional, self.unconditional, self.weight = conditional, unconditional, check_number("weight", weight)
        self.register_buffer("sigmas", torch.tensor(check_sigmas(sigmas), dtype=torch.float32), persistent=False)
        self.training = bool(getattr(conditional, "training", False))

    @property
    def shape(self):
        return getattr(self.conditional, "shape", None)

    @property
    def plan(self):
        return getattr(self.conditional, "plan", None)

    @property
    def data_range(self):
        return getattr(self.conditional, "data_range", None)

    @property
    def predicts(self):
        return getattr(self.conditional, "predicts", "score")

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        other = self.unconditional(x, level).float()
        return other + self.weight * (self.conditional(x, level).float() - other)

    def at_sigmas(self, sigmas: Sigmas) -> ClassifierFree:
        models = (at_sigmas(m, sigmas) for m in (self.conditional, self.unconditional))
        return ClassifierFree(*models, self.weight, sigmas)


def classifier_free(
    conditional: Callable, unconditional: Callable, weight: float, sigmas: Sigmas | None = None
) -> ClassifierFree:
    """Classifier-free guidance (arXiv 2207.12598): score_u + weight·(score_c − score_u); their w is weight − 1.

    conditional, unconditional: model(x, level) → score, with the condition bound, and without one; usually two views of
    one network. A row then costs two network evaluations. weight 1 is the conditional model, any other a heuristic.
    """
    return ClassifierFree(conditional, unconditional, weight, sigmas)


def posterior(
    model: Callable, operator: LinearOperator, y: Tensor, noise: float = 0.0, sigmas: Sigmas | None = None
) -> Guided:
    """Samples given y = A·x + noise·z: score + Aᵀ(y − A·x)/(noise² + σ²) (arXiv 2108.01368), for Langevin plans.

    operator: A, see inverse.py. y: one measurement, [*A's output] or [1, …]. noise: its std, in units of y, >= 0.
    As σ falls this becomes the exact posterior's score, and Langevin rows there sample it; before, and for other plans
    than Langevin's, it is a heuristic: docs/samplers.md says how far off.
    """
    noise = check_number("noise", noise)
    if not noise >= 0:
        raise ValueError(f"noise must be >= 0, got {noise}")
    y = torch.as_tensor(y, dtype=torch.float32)
    if not y.isfinite().all():
        raise ValueError("y must be finite; pixels that were not measured belong into the operator: mask(…)")
    measured = list(operator.forward(torch.zeros(1, *operator.shape)).shape[1:])
    if list(y.shape) not in (measured, [1, *measured]):
        raise ValueError(
            f"y must be one measurement, {measured} or {[1, *measured]}, got {list(y.shape)}: all samples of a request "
            "share it; for several measurements make a model for each"
        )
    norm2 = operator.norm**2

    def term(x: Tensor, sigma: Tensor) -> Tensor:
        residual = y.to(x.device) - operator.forward(x)
        return operator.adjoint(residual) / (noise**2 + sigma**2)

    return Guided(model, [term], sigmas, curvature=lambda sigma: norm2 / (noise**2 + sigma**2))


class Preconditioned(nn.Module):
    """forward(y [B, C, H, W], level [B]) → Rᵀ·score(R·y): the same law in the coordinates y, where x = R·y."""

    def __init__(self, model: Callable, root: LinearOperator, sigmas: Sigmas | None = None):
        super().__init__()
        sigmas = getattr(model, "sigmas", None) if sigmas is None else sigmas
        if sigmas is None:
            raise ValueError("sigmas: the model has none of its own, so pass its noise levels, descending")
        got = tuple(root.forward(torch.zeros(1, *root.shape)).shape[1:])
        if got != root.shape:
            raise ValueError(f"root must map images {list(root.shape)} to such images, got {list(got)}")
        self.model, self.root, self.shape = model, root, root.shape
        self.register_buffer("sigmas", torch.tensor(check_sigmas(sigmas), dtype=torch.float32), persistent=False)
        self.training = bool(getattr(model, "training", False))  # of this module alone: its parts stay as they are

    def forward(self, y: Tensor, level: Tensor) -> Tensor:
        return self.root.adjoint(self.model(self.root.forward(y), level).float())

    def image(self, y: Tensor) -> Tensor:
        """x = R·y, of what the engine drew."""
        return self.root.forward(y)

    def at_sigmas(self, sigmas: Sigmas) -> Preconditioned:
        return Preconditioned(at_sigmas(self.model, sigmas), self.root, sigmas)


def preconditioned(model: Callable, root: LinearOperator, sigmas: Sigmas | None = None) -> Preconditioned:
    """Preconditioned Langevin, x ← x + α·R·Rᵀ·score + √(2α)·R·z: what a plan's Langevin rows are for x = R·y.

    root: R, see inverse.py. With R·Rᵀ = (covariance of x)/σ², every direction of y is as stiff as 1/σ², the stiffest
    that a plan reckons with, and relaxes in σ²/α steps; a larger R diverges. The engine draws y and its
    white noise; ``.image(y)`` is x. Langevin rows only, and ``denoise=False``: other rows take σ for the noise of y.
    One R serves all levels, so this is for chains at one level.
    """
    return Preconditioned(model, root, sigmas)
