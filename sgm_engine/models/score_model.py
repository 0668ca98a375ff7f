"""``as_score(model, kind)``: whatever a network predicts, as the one protocol: f(x, level) → score, with ``.sigmas``.

With x = data + σ·noise, D the denoised image and F the network, every kind is one row of a table:

    D = c_skip·x + c_out·F(c_in·x, condition)
    score = (D − x)/σ² = q·(F − s·x)   with q = c_out/σ², s = (1 − c_skip)/c_out
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from sgm_engine.models.ddpm_levels import ddpm_levels
from sgm_engine.models.energy import value_and_gradient
from sgm_engine.outputs.images import Range, check_range, range_of
from sgm_engine.plans.schedule import Sigmas, check_number, check_sigmas


class Row(NamedTuple):
    """Coefficients at sigmas [L], each [L] or a number. condition: what the network is told by default."""

    c_in: np.ndarray | float
    q: np.ndarray | float
    s: np.ndarray | float
    condition: str


def _variance_preserving(sigma: np.ndarray) -> np.ndarray:
    """√ᾱ = 1/√(1 + σ²): what turns data + σ·noise into √ᾱ·data + √(1−ᾱ)·noise."""
    return 1 / np.sqrt(1 + sigma**2)


def _edm(sigma: np.ndarray, sigma_data: float) -> Row:
    total = sigma_data**2 + sigma**2
    c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / np.sqrt(total)
    return Row(1 / np.sqrt(total), c_out / sigma**2, (1 - c_skip) / c_out, "c_noise")


KINDS: dict[str, Callable[[np.ndarray, float], Row]] = {
    "score": lambda sigma, _: Row(1.0, 1.0, 0.0, "level"),
    "denoiser": lambda sigma, _: Row(1.0, 1 / sigma**2, 1.0, "sigma"),
    "noise_prediction": lambda sigma, _: Row(1.0, -1 / sigma, 0.0, "sigma"),
    "vp_noise_prediction": lambda sigma, _: Row(_variance_preserving(sigma), -1 / sigma, 0.0, "timestep"),
    "vp_denoiser": lambda sigma, _: Row(_variance_preserving(sigma), 1 / sigma**2, 1.0, "timestep"),
    "v_prediction": lambda sigma, _: Row(
        _variance_preserving(sigma),
        -_variance_preserving(sigma) / sigma,
        -sigma * _variance_preserving(sigma),
        "timestep",
    ),
    "edm": _edm,
    "flow": lambda sigma, _: Row(1 / (1 + sigma), -1 / (sigma * (1 + sigma)), -1.0 * np.ones_like(sigma), "flow_time"),
}
CONDITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "level": lambda sigma: np.arange(len(sigma)),
    "sigma": lambda sigma: sigma,
    "log_sigma": np.log,
    "c_noise": lambda sigma: np.log(sigma) / 4,
    "flow_time": lambda sigma: sigma / (1 + sigma),
}


class NotAScore(ValueError):
    """A network returned something that is no score of its input."""


class ScoreModel(nn.Module):
    """forward(x [N, C, H, W], level [N] int64) → score, float32 [N, C, H, W]. Make one with :func:`as_score`."""

    def __init__(
        self, model: Callable, sigmas: np.ndarray, row: Row, condition: np.ndarray, options: dict, data_range: Range
    ):
        super().__init__()
        self._data_range = data_range
        self.given = dict(options.get("given") or {})
        for name, value in self.given.items():
            if isinstance(value, Tensor):
                self.register_buffer(f"given_{name}", value, persistent=False)
        self.half = bool(options.get("learned_variance"))
        self.model, self.options = model, options  # as_score's, for at_sigmas
        self.plain = not np.any(row.s)
        levels = len(sigmas)
        for name, value in (("sigmas", sigmas), ("c_in", row.c_in), ("q", row.q), ("s", row.s)):
            column = torch.tensor(np.broadcast_to(value, levels).copy(), dtype=torch.float32)
            self.register_buffer(name, column, persistent=False)
        whole = np.issubdtype(condition.dtype, np.integer)
        self.register_buffer(
            "condition", torch.tensor(condition, dtype=torch.int64 if whole else torch.float32), persistent=False
        )
        self.scaled = bool((self.c_in != 1).any())
        self.unit = bool((self.s == 1).all())
        self.direct = self.plain and bool((self.q == 1).all())

    @property
    def shape(self):
        return getattr(self.model, "shape", None)

    data_range = property(lambda self: self._data_range, doc="(low, high) of the data that x is noised from")
    predicts = property(lambda self: self.options["kind"], doc="the kind that as_score was given")

    def _given(self, name: str, value: object, n: int) -> object:
        """A further argument of the network, for n images."""
        if isinstance(value, Tensor):
            value = getattr(self, f"given_{name}")
            return value.expand(n, *value.shape[1:])
        if isinstance(value, int) and not isinstance(value, bool):
            return torch.full((n,), value, dtype=torch.int64, device=self.sigmas.device)
        return value

    @property
    def plan(self):
        return getattr(self.model, "plan", None)

    law = property(lambda self: getattr(self.model, "law", None))
    front = property(lambda self: getattr(self.model, "front", None))

    def at_sigmas(self, sigmas: Sigmas) -> ScoreModel:
        """The same network at other levels; see conditioning.at_sigmas. A DDPM is told timesteps between its own."""
        if self.options["condition"] == "level":
            raise ValueError(
                "this model is told whole numbers (level), not sigmas: take plan.on_levels(model.sigmas) instead"
            )
        return as_score(self.model, sigmas=sigmas, data_range=self.data_range, **self.options)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        def column(of: Tensor) -> Tensor:
            return of.index_select(0, level)[:, None, None, None]

        given = {name: self._given(name, value, len(x)) for name, value in self.given.items()}
        found = self.model(column(self.c_in) * x if self.scaled else x, self.condition[level], **given)
        found = checked_score(found, x, self.half).float()
        if self.direct:
            return found
        if self.plain:
            return column(self.q) * found
        return column(self.q) * (found - (x if self.unit else column(self.s) * x))


class EnergyScore(ScoreModel):
    """forward(x, level) → −∇E of a network that answers with energies; differentiable where gradients are enabled."""

    def energy(self, x: Tensor, level: Tensor) -> Tensor:
        """E(x) [N], float32 or float64."""
        given = {name: self._given(name, value, len(x)) for name, value in self.given.items()}
        found = self.model(x, self.condition[level], **given)
        if not isinstance(found, Tensor) or found.numel() != len(x) or found.shape[:1] != x.shape[:1]:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise NotAScore(f"model must return one energy a sample, [{len(x)}] or [{len(x)}, 1, …], got {what}")
        return found.flatten().to(torch.promote_types(found.dtype, torch.float32))

    def log_q_and_score(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(−E(x) [N], −∇E(x), like x): what ``mala`` takes, since a constant of each level falls out of its ratios."""
        return value_and_gradient(lambda x: -self.energy(x, level), x)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.log_q_and_score(x, level)[1]


def checked_score(found: object, x: Tensor, half: bool = False) -> Tensor:
    """found, or its ``sample``, which must be a tensor of x's shape; half: its first half, of twice the channels."""
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found  # diffusers' outputs
    twice = isinstance(found, Tensor) and found.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    if half and twice:
        return found[:, : x.shape[1]]
    if not isinstance(found, Tensor) or found.shape != x.shape or half:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        said = "wrap it to do so"
        if twice:
            said = (
                "if the second half of its channels is a learned variance, pass learned_variance=True to leave it out"
            )
        if isinstance(found, Tensor) and found.numel() == len(x):
            said = "as_score(model, kind='energy') makes a score of an energy"
        if half:
            said = "learned_variance=True is for networks of twice x's channels"
        raise NotAScore(f"model must return a tensor of x's shape {list(x.shape)}, got {what}: {said}")
    return found


fx.wrap("checked_score")  # one call in a traced graph: it asks for types, which a trace does not have


def as_score(
    model: Callable[[Tensor, Tensor], Tensor],
    kind: str = "score",
    sigmas: Sigmas | None = None,
    condition: str | Callable[[np.ndarray], object] | None = None,
    alphas_cumprod: Sequence[float] | np.ndarray | Tensor | None = None,
    timesteps: Sequence[int] | np.ndarray | None = None,
    sigma_data: float = 0.5,
    given: Mapping[str, object] | None = None,
    learned_variance: bool = False,
    data_range: Range | None = None,
) -> ScoreModel:
    """Any network as f(x, level) → score of x = data + σ·noise; its parameters stay the model's own.

    kind: what model(input, condition) returns.
        "score"                 ∇ log p_σ(x)                       input x, told the level
        "energy"                E(x) = −log p_σ(x) + const(σ)      input x, told the level; [N] or [N, 1, …]. The score
                                is −∇E by autograd, and ``log_q_and_score`` gives both
        "denoiser"              D, the data                        input x, told sigma (k-diffusion's contract)
        "noise_prediction"      the noise                          input x, told sigma
        "vp_noise_prediction"   the noise (DDPM)                   input x/√(1 + σ²), told the timestep
        "vp_denoiser"           the data                           input x/√(1 + σ²), told the timestep
        "v_prediction"          √ᾱ·noise − √(1−ᾱ)·data             input x/√(1 + σ²), told the timestep
        "edm"                   F of arXiv 2206.00364, table 1     input c_in·x, told ¼·ln σ; sigma_data as trained
        "flow"                  noise − data (rectified flow)      input x/(1 + σ), told t = σ/(1 + σ)
    sigmas: the levels [L] to sample at, descending, in units of x; None takes ``model.sigmas``. Continuous models take
        any. condition: what the network is told instead: "level", "sigma", "log_sigma", "c_noise", "flow_time", or a
        function of the sigmas, float64 [L] → [L] or [L, …].
    alphas_cumprod [T], timesteps [L] (descending, None: all of ᾱ < 1): the ᾱ of a DDPM; sigmas are then √((1−ᾱ)/ᾱ) at
        them. With sigmas: the network is told the timesteps between its own where these are, linear in ln σ.
    given: further arguments of the network, by name: an int is the class of every image (int64 [N]), a tensor [1, …] is
        repeated for every image, anything else is passed as it is.
    learned_variance: the network returns 2·C channels, and the second C, a variance, are left out.
    data_range: (low, high) of the data that the network was trained on, such as (-1, 1); pictures are made of that.
        None takes ``model.data_range``, else [0, 1].

    The network may return a tensor or what holds one as ``sample``. Raises ValueError for an unknown kind or condition,
    or sigmas that do not descend.
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, condition), got {type(model).__name__}")
    if kind not in KINDS and kind != "energy":
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, energy, got {kind!r}")
    steps = None
    if alphas_cumprod is not None:
        if sigmas is not None and timesteps is not None:
            raise ValueError("sigmas and timesteps both give the noise levels: pass one of them")
        sigmas, steps = ddpm_levels(alphas_cumprod, timesteps, sigmas)
    elif timesteps is not None:
        raise ValueError("timesteps index alphas_cumprod: pass alphas_cumprod too")
    sigmas = getattr(model, "sigmas", None) if sigmas is None else sigmas
    if sigmas is None:
        raise ValueError("sigmas: the model has none of its own, so pass the levels to sample at, descending")
    sigmas = check_sigmas(sigmas)
    sigma_data = check_number("sigma_data", sigma_data)
    if not 0 < sigma_data < np.inf:
        raise ValueError(f"sigma_data must be positive and finite, got {sigma_data}")
    row = KINDS["score" if kind == "energy" else kind](sigmas, sigma_data)
    condition = row.condition if condition is None else condition
    if condition == "timestep":
        if steps is None:
            raise ValueError(f"kind={kind!r} is told timesteps: pass alphas_cumprod=, or another condition=")
        told = steps
    elif callable(condition):
        told = _told_by(condition, sigmas)
    elif condition in CONDITIONS:
        told = CONDITIONS[condition](sigmas)
    else:
        known = ", ".join(CONDITIONS)
        raise ValueError(f"condition must be timestep, one of {known}, or a function of the sigmas, got {condition!r}")
    options = {"kind": kind, "condition": condition, "sigma_data": sigma_data, "given": _checked(given)}
    options |= {"learned_variance": learned_variance, "alphas_cumprod": alphas_cumprod if steps is told else None}
    data_range = range_of(model) if data_range is None else check_range(data_range)
    kind_of_model = EnergyScore if kind == "energy" else ScoreModel
    score = kind_of_model(model, sigmas, row, told, options, data_range)
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    score.training = bool(getattr(model, "training", False))  # of this alone: the model's parts stay as they are
    return score if device is None else score.to(device)


def _told_by(condition: Callable, sigmas: np.ndarray) -> np.ndarray:
    told = condition(sigmas.copy())
    told = told.detach().cpu().numpy() if isinstance(told, Tensor) else np.asarray(told)
    if told.shape[:1] != sigmas.shape or told.dtype.kind not in "iuf":
        raise ValueError(f"condition(sigmas) must be numbers, one row for each of {len(sigmas)}, got {told.shape}")
    return told


def _checked(given: Mapping[str, object] | None) -> dict[str, object]:
    for name, value in (given or {}).items():
        if isinstance(value, Tensor) and (value.dim() == 0 or len(value) != 1):
            raise ValueError(f"given[{name!r}] must be a tensor [1, …], one image's, got {list(value.shape)}")
    return dict(given or {})
