"""A classifier of noise levels as a density and as a score model (classification diffusion, arXiv 2402.10095).

With logits f_t(u) = log p(t | u) + anything that does not depend on t, Bayes' rule gives every class's log density:

    log p_t(u) = f_t(u) − f_r(u) + log π_r − log π_t + log N(u; 0, σ_r²·I)        r = T + 1, the reference class

and its gradient the score. All of it is in one forward pass, and one backward pass to the input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.models.cdm.classes import NoiseClasses, check_label
from sgm_engine.models.energy import value_and_gradient
from sgm_engine.plans.schedule import Sigmas, check_sigmas, nearest_level


class OfClasses(nn.Module):
    """A network that meets images by classes of noise, as a score model: what CDM and DDM have in common.

    x = data + σ·noise in the user's units, the network sees u = signal·(scale·x + shift). Level i is the σ of class
    T − i in units of x, so ``sigmas`` descends; ``levels``: a choice of classes, noisiest first (None: all). shape: of
    a sample. plan: as a checkpoint's. prior [T + 2]: how often each class is met in training (None: equally).
    class_label: of the samples, where the network has labels; None: of any. guidance: weight of classifier-free
    guidance, the network's answer without label + guidance·(that with it − the one without).

    Computes in the dtype of x; the tables are kept in float64.
    """

    def __init__(
        self,
        classifier: nn.Module,
        classes: NoiseClasses,
        shape: tuple[int, ...] | None = None,
        scale: float = 1.0,
        shift: float = 0.0,
        prior=None,
        levels=None,
        plan: dict | None = None,
        class_label: int | None = None,
        guidance: float = 1.0,
    ):
        super().__init__()
        if not (math.isfinite(scale) and scale > 0 and math.isfinite(shift)):
            raise ValueError(f"scale must be positive and shift finite, got {scale} and {shift}")
        self.classifier, self.classes, self.shape, self.plan = classifier, classes, shape, plan
        self.scale, self.shift = float(scale), float(shift)
        self.labels = int(getattr(classifier, "labels", 0))
        self.class_label, self.guidance = check_label(class_label, guidance, self.labels)
        count = classes.levels + 2
        prior = np.full(count, 1 / count) if prior is None else np.asarray(prior, np.float64) / np.sum(prior)
        if prior.shape != (count,) or not (prior > 0).all():
            raise ValueError(f"prior must hold {count} positive numbers, one a class, got {prior}")
        levels = np.arange(count - 2, 0, -1) if levels is None else np.asarray(levels)
        sigmas = check_sigmas(classes.noise[levels] / classes.signal[levels] / self.scale)
        tables = {"signal": classes.signal, "noise": classes.noise, "log_prior": np.log(prior), "level_class": levels}
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, device="cpu"), persistent=False)
        self.register_buffer("sigmas", torch.tensor(sigmas, dtype=torch.float32, device="cpu"), persistent=False)
        self.prior = prior

    @property
    def training_levels(self) -> int:
        """T + 2: what a trainer draws a level from, here a class."""
        return self.classes.levels + 2

    def draw_class(self, uniform: Tensor) -> Tensor:
        """Classes [N] as often as the prior says, of uniform [0, 1) numbers [N]."""
        share = torch.tensor(np.cumsum(self.prior)[:-1], dtype=torch.float64, device=uniform.device)
        return torch.searchsorted(share, uniform.double(), right=True)

    def to_u(self, x: Tensor) -> Tensor:
        return x if (self.scale, self.shift) == (1, 0) else x * self.scale + self.shift

    def noise_pred_direct(self, u: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[ε | u, class t] as the network's own ``direct`` reads it off its weights: no gradient in u is taken."""
        if not hasattr(self.classifier, "direct"):
            raise ValueError(f"a {type(self.classifier).__name__} has no direct denoiser: take a network of potentials")
        return self._guided(lambda *label: self.classifier.direct(u, t, *label), u, labels)

    def _guided(self, network: Callable[..., Tensor], u: Tensor, labels: Tensor | None) -> Tensor:
        """What ``network`` answers with ``labels`` [N] (``self.labels``: none), else with the model's own, guided."""
        if not self.labels:
            if labels is not None:
                raise ValueError("labels: this network has none: leave them out")
            return network()

        def of(label: int) -> Tensor:
            return network(torch.full((len(u),), label, dtype=torch.int64, device=u.device))

        if labels is not None:
            return network(labels)
        if self.class_label is None:
            return of(self.labels)
        if self.guidance == 1:
            return of(self.class_label)
        free = of(self.labels)
        return free + self.guidance * (of(self.class_label) - free)

    def with_class(self, class_label: int | None, guidance: float = 1.0):
        """The same network, its weights shared, drawing another class, with classifier-free guidance (1: none)."""
        other = self._like(self.level_class.cpu().numpy(), class_label, guidance)
        for name in {"law", "front", "averaged"} & vars(self).keys():
            setattr(other, name, getattr(self, name))
        if (config := getattr(self, "config", None)) is not None:
            other.config = dataclasses.replace(config, class_label=class_label, guidance=guidance)
        return other

    def at_sigmas(self, sigmas: Sigmas):
        """The same network with some of its levels only; ValueError for a σ that is none of them."""
        sigmas, own = check_sigmas(sigmas), self.sigmas.double().cpu().numpy()
        level = nearest_level(sigmas, own)
        off = np.flatnonzero(np.abs(own[level] / sigmas - 1) > 1e-5)
        if len(off):
            raise ValueError(
                f"sigma {sigmas[off[0]]:g} is none of this classifier's levels (nearest: {own[level[off[0]]]:g}): take "
                "plan.on_levels(model.sigmas), or sigmas out of model.sigmas"
            )
        return self._like(self.level_class.cpu().numpy()[level], self.class_label, self.guidance)

    def _like(self, levels: np.ndarray, class_label: int | None, guidance: float):
        other = type(self)(
            self.classifier, self.classes, self.shape, self.scale, self.shift, self.prior, levels, self.plan,
            class_label, guidance,
        )  # fmt: skip
        other.training = self.training  # of this alone: the network's parts stay as they are
        return other.to(self.sigmas.device)


class CDM(OfClasses):
    """forward(x [N, …], level [N] int64) → ∇ₓ log q_σ(x), like x: a score model for an Engine, with every plan.

    classifier: u [N, …] → logits [N, T + 2], or u and labels [N] → them. Other arguments: of OfClasses.
    """

    def logits(self, u: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N, T + 2] of images u [N, …] as the classifier sees them, and of ``labels`` [N], else the model's own."""
        return self._guided(lambda *label: self.classifier(u, *label), u, labels)

    def class_log_prob(self, u: Tensor, t: Tensor, logits: Tensor | None = None) -> Tensor:
        """log p_t(u) of each image's own class t [N], nats, [N]; exact for the reference class."""
        f = self.logits(u) if logits is None else logits
        ratio = f.gather(1, t[:, None])[:, 0] - f[:, -1]
        prior = (self.log_prior[-1] - self.log_prior[t]).to(u.dtype)
        return ratio.to(u.dtype) + prior + _log_normal(u, float(self.classes.noise[-1]))

    def noise_pred(
        self, u: Tensor, t: Tensor, create_graph: bool = False, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[ε | u, class t] = −noise_t·∇ log p_t(u), like u, and the logits. One forward, one backward pass."""
        with torch.enable_grad():
            u = u if u.requires_grad else u.detach().requires_grad_()
            f = self.logits(u, labels)
            (gradient,) = torch.autograd.grad(self.class_log_prob(u, t, f).sum(), u, create_graph=create_graph)
        return -_column(self.noise[t], u) * gradient, f

    def log_q(self, x: Tensor, level: Tensor) -> Tensor:
        """log q_σ(x) of data + σ·noise, nats, [N]; σ of each sample's own level [N]."""
        t = self.level_class[level]
        signal = _column(self.signal[t], x)
        volume = x[0].numel() * (signal.flatten().log() + math.log(self.scale))
        return self.class_log_prob(signal * self.to_u(x), t) + volume

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of data, nats, [N], from one forward pass: log N(x; 0, I) + f₀ − f_{T+1} where scale is 1."""
        if self.guidance != 1:
            raise ValueError(f"guidance must be 1 for a density, got {self.guidance:g}: take with_class(n)")
        u = self.to_u(x)
        return self.class_log_prob(u, self.level_class.new_zeros(len(x))) + x[0].numel() * math.log(self.scale)

    def log_q_and_score(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(log q_σ(x) [N], its gradient, like x). Differentiable itself where gradients are enabled."""
        return value_and_gradient(lambda x: self.log_q(x, level), x)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.log_q_and_score(x, level)[1]


class DDM(OfClasses):
    """The baseline of a CDM: a network that only denoises. forward(x, level) → its score, of −E[ε | u]/noise.

    classifier: has ``direct(u [N, …], t [N]) → E[ε | u, class t]``, and no logits are asked of it.
    """

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        t = self.level_class[level]
        signal, noise = _column(self.signal[t], x), _column(self.noise[t], x)
        return self.noise_pred_direct(signal * self.to_u(x), t) * (-self.scale * signal / noise)


def _column(v: Tensor, like: Tensor) -> Tensor:
    """[N] → [N, 1, …] in the dtype of ``like``."""
    return v.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _log_normal(u: Tensor, sigma: float) -> Tensor:
    """log N(u; 0, σ²·I) [N]."""
    d = u[0].numel()
    return -u.flatten(1).square().sum(1) / (2 * sigma**2) - d / 2 * math.log(2 * math.pi * sigma**2)
