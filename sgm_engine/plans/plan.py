"""A sampler is a table, one row per network evaluation, and functions return it: those of few steps in samplers.py.

Row r moves the state by    x ← a·x + b·score(x, level) + c·z + d·previous,    z ~ N(0, I), one draw a row,
and then stores for later   previous ← e·x + f·score   (x as it was before the row), unless e = f = 0.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from sgm_engine.files.reading import parse_json
from sgm_engine.plans.report import Shown, check_label, refuse_divergence, refuse_unstored
from sgm_engine.plans.schedule import (
    Shift,
    Sigmas,
    check_column,
    check_count,
    check_number,
    check_shift,
    check_sigmas,
    check_start,
    nearest_level,
)

FORMAT, VERSION, STARTS = "sgm-plan", 2, ("uniform", "normal")
COLUMNS = ("level", "sigma", "a", "b", "c", "d", "e", "f", "adaptive")
SINCE_2 = ("e", "f", "adaptive")  # columns that version 1 does not have; all zero unless given
NCSN_STEP = 2e-5  # step_lr of NCSN


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Shown):
    """A frozen table of R rows, and the distribution that a chain starts from.

    level: int64 [R], index into the model's sigmas. sigma: [R], that row's noise in units of x. a, b, c, d, e, f: [R].
    adaptive: [R], 0 or 1; where 1, b is divided by r² and c by r, the root mean square of the sample's own score.
    start: x₀ = start_shift + start_scale·u, with u uniform on [0, 1) or standard normal; start_shift: a number or, for
        samples of that shape, an array [C, H, W].
    metadata: anything JSON can hold; it travels with the plan and changes nothing.

    Arrays are float64 here and read-only; the engine rounds them to float32 once. ValueError names the field and value.
    """

    level: np.ndarray
    sigma: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray | None = None
    start: str = "uniform"
    start_scale: float = 1.0
    start_shift: Shift = 0.0
    name: str = "custom"
    metadata: dict[str, Any] = field(default_factory=dict)
    e: np.ndarray | None = None
    f: np.ndarray | None = None
    adaptive: np.ndarray | None = None

    def __post_init__(self) -> None:
        level = np.array(self.level)
        if level.ndim != 1 or len(level) == 0:
            raise ValueError(f"level must be a vector of at least one row, got shape {level.shape}")
        if level.dtype.kind not in "iu" or level.min() < 0 or level.max() >= 2**31:
            span = f", {level.min()} to {level.max()}" if level.dtype.kind in "iuf" else ""
            raise ValueError(f"level must hold integers >= 0 and below 2**31, got {level.dtype}{span}")
        self._freeze("level", level.astype(np.int64))
        for name in COLUMNS[1:]:
            given = getattr(self, name)
            column = np.zeros(len(level)) if given is None else check_column(name, given)
            if column.shape != level.shape:
                raise ValueError(f"{name} has shape {column.shape}, but level has {level.shape}: one value a row")
            with np.errstate(over="ignore"):
                bad = np.flatnonzero(~np.isfinite(column.astype(np.float32)))
            if len(bad):
                raise ValueError(f"{name} must be finite in float32, got {name}[{bad[0]}] = {column[bad[0]]}")
            self._freeze(name, column)
        if self.sigma.min() <= 0:
            i = int(self.sigma.argmin())
            raise ValueError(f"sigma must be positive, got sigma[{i}] = {self.sigma[i]}")
        self._freeze("start_shift", check_start(self.start, self.start_scale, self.start_shift))
        if len(odd := self.adaptive[~np.isin(self.adaptive, (0, 1))]):
            raise ValueError(f"adaptive must be 0 or 1, got {odd[0]}")
        check_label(self.name, self.metadata)
        refuse_unstored(self)
        refuse_divergence(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As read-only after copy and pickle as before."""
        self.__dict__.update(state)
        for name in (*COLUMNS, "start_shift"):
            self._freeze(name, getattr(self, name))

    def _freeze(self, name: str, column: Shift) -> None:
        if isinstance(column, np.ndarray):
            column.setflags(write=False)
        object.__setattr__(self, name, column)

    @property
    def stores(self) -> np.ndarray:
        """bool [R]: the rows that store something into previous."""
        return (self.e != 0) | (self.f != 0)

    @property
    def sigmas(self) -> np.ndarray:
        """The distinct sigmas of the rows, descending: what a model has to be conditioned on (``at_sigmas``)."""
        return np.unique(self.sigma)[::-1]

    def on_levels(self, sigmas: Sigmas) -> Plan:
        """These rows for a model that knows the levels ``sigmas`` [L] only, each at the nearest one (log scale), σ_l.

        The score at σ is taken as (σ_l/σ)² times the score at σ_l: the denoised image is then that level's own. Exact
        where σ is a level; otherwise an approximation, better the closer the levels. docs/samplers.md has figures.
        """
        sigmas = check_sigmas(sigmas)
        level = nearest_level(self.sigma, sigmas)
        factor = (sigmas[level] / self.sigma) ** 2
        return replace(self, level=level, sigma=sigmas[level], b=self.b * factor, f=self.f * factor)

    @property
    def nfe(self) -> int:
        """Network evaluations a sample: the number of rows."""
        return len(self.level)

    @cached_property
    def digest(self) -> str:
        """sha256 of everything that decides a sample: the table and the start, not the name or the metadata."""
        unused = {name for name in SINCE_2 if not getattr(self, name).any()}
        content = {k: v for k, v in self._as_dict().items() if k not in {"name", "metadata"} | unused}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_json(self) -> str:
        """The plan as JSON text; floats survive exactly."""
        return json.dumps({"format": FORMAT, "version": VERSION, **self._as_dict()})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote. ValueError says why a text is refused."""
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ValueError(f"not a plan: invalid JSON ({error})") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f'not a plan: expected an object with "format": "{FORMAT}"')
        version = content.pop("version", None)
        if isinstance(version, bool) or version not in (1, VERSION):
            raise ValueError(f"plan version {version!r} is not supported: this release reads versions 1 and {VERSION}")
        known = set(cls.__dataclass_fields__) - (set(SINCE_2) if version == 1 else set())
        if content.keys() != known:
            missing, unknown = sorted(known - content.keys()), sorted(content.keys() - known)
            raise ValueError(f"plan fields differ: missing {missing}, unknown {unknown}")
        try:
            return cls(**content)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"not a plan: {error}") from None

    def _as_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in fields.items()}


def annealed_langevin(
    sigmas: Sigmas,
    steps_per_level: int = 100,
    step_lr: float | None = None,
    convention: str = "code",
    denoise: bool = True,
    start: str = "uniform",
    start_scale: float = 1.0,
    start_shift: Shift = 0.0,
) -> Plan:
    """Annealed Langevin dynamics (NCSN, arXiv 1907.05600, algorithm 1): ``steps_per_level`` rows at each of sigmas [L].

    The step size at σ is α = step_lr·(σ/σ_L)². convention "code": x + α·s + √(2α)·z, as in the authors' programs;
    "paper": x + (α/2)·s + √α·z, half of it. denoise: one more row x + σ_L²·s without noise.
    Defaults are those of NCSN on images in [0, 1]: step_lr 2e-5, for σ_L = 0.01; where that exceeds σ_L², 0.2·σ_L², as
    it is there. NCSNv2 (arXiv 2006.09011) on CIFAR-10 has T = 5, step_lr = 6.2e-6.
    """
    sigmas = check_sigmas(sigmas)
    check_count("steps_per_level", steps_per_level, len(sigmas))
    last = float(sigmas[-1]) ** 2
    step_lr = check_number("step_lr", (NCSN_STEP if last >= NCSN_STEP else 0.2 * last) if step_lr is None else step_lr)
    if not 0 < step_lr < np.inf:
        raise ValueError(f"step_lr must be positive and finite, got {step_lr}")
    if convention not in ("code", "paper"):
        raise ValueError(f"convention must be 'code' or 'paper', got {convention!r}")
    level = np.repeat(np.arange(len(sigmas)), steps_per_level)
    alpha = step_lr * (sigmas[level] / sigmas[-1]) ** 2
    if not isinstance(denoise, (bool, np.bool_)):
        raise TypeError(f"denoise must be True or False, got {denoise!r}")
    drift = alpha if convention == "code" else alpha / 2
    most = 2 if convention == "code" else 4
    if step_lr >= most * last * (1 - 1e-9):
        says = f"for σ_L = {sigmas[-1]:g} (sigmas[-1]) it has to stay below {most * last:.3g}, {most}·σ_L²"
        raise ValueError(f"step_lr = {step_lr:g} must diverge: {says}")
    options = {"steps_per_level": int(steps_per_level), "step_lr": step_lr, "convention": convention}
    options["denoise"] = bool(denoise)
    table = (level, np.ones(len(level)), drift, np.sqrt(2 * drift))
    start_law = (start, start_scale, start_shift)
    return _plan("annealed_langevin", sigmas, table, denoise, start_law, options)


def consistent_annealed(
    sigmas: Sigmas,
    steps_per_level: int = 1,
    eta: float = 1.0,
    start_scale: float | None = None,
    start_shift: Shift = 0.0,
) -> Plan:
    """Consistent annealed sampling (arXiv 2009.05475, algorithm 2), one or more rows at each of sigmas [L].

    A row moves σ → σ' (the next level, or σ itself while steps remain), γ = σ'/σ: x + η·σ²·s + σ'·√(1 − ((1−η)/γ)²)·z,
    which keeps the noise in x at exactly σ'. eta 1 denoises and noises afresh; it must lie in [1−γ, 1+γ] for every γ.
    """
    sigmas = check_sigmas(sigmas)
    check_count("steps_per_level", steps_per_level, len(sigmas))
    level = np.repeat(np.arange(len(sigmas)), steps_per_level)[:-1]  # the last row is the denoising one
    after = np.repeat(np.arange(len(sigmas)), steps_per_level)[1:]
    sigma, gamma = sigmas[level], sigmas[after] / sigmas[level]
    eta = check_number("eta", eta)
    bad = np.flatnonzero(np.abs(1 - eta) > gamma)
    if len(bad):
        low, high = 1 - gamma.min(), 1 + gamma.min()
        raise ValueError(f"eta must lie in [{low:.4g}, {high:.4g}] for these sigmas, got {eta}")
    noise = sigma * np.sqrt(gamma**2 - (1 - eta) ** 2)
    table = (level, np.ones(len(level)), eta * sigma**2, noise)
    options = {"steps_per_level": int(steps_per_level), "eta": eta}
    return _plan("consistent_annealed", sigmas, table, True, _prior(sigmas, start_scale, start_shift), options)


def reverse_diffusion(sigmas: Sigmas, start_scale: float | None = None, start_shift: Shift = 0.0) -> Plan:
    """The reverse variance-exploding diffusion, discretised (arXiv 2011.13456, eq. 46), one row at each of sigmas."""
    sigmas = check_sigmas(sigmas)
    drop = sigmas[:-1] ** 2 - sigmas[1:] ** 2
    table = (np.arange(len(drop)), np.ones(len(drop)), drop, np.sqrt(drop))
    return _plan("reverse_diffusion", sigmas, table, True, _prior(sigmas, start_scale, start_shift), {})


def ancestral(
    sigmas: Sigmas, start_scale: float | None = None, start_shift: Shift = 0.0, beta_unit: float = 0.0, eta: float = 1.0
) -> Plan:
    """Ancestral sampling of the discrete chain (arXiv 2011.13456, eq. 47), one row at each of sigmas [L].

    beta_unit: 0 adds DDPM's β̃ ("fixed_small"); else its β ("fixed_large", arXiv 2006.11239, section 3.2), of chains
    that end in N(0, beta_unit²), in units of x. eta: times that noise, at most the next level's; above 1: churned.
    """
    sigmas, unit, eta = check_sigmas(sigmas), check_number("beta_unit", beta_unit), check_number("eta", eta)
    if not (0 < eta < np.inf and (unit == 0 or eta == 1)):
        raise ValueError(f"eta must be positive and finite, and 1 where beta_unit is given, got {eta}")
    now, after, drop = sigmas[:-1], sigmas[1:], sigmas[:-1] ** 2 - sigmas[1:] ** 2
    posterior = after * np.sqrt(1 - (after / now) ** 2)
    noise = np.sqrt(drop * (unit**2 + after**2) / (unit**2 + now**2)) if unit else np.minimum(eta * posterior, after)
    drop = drop if eta == 1 else now**2 - now * np.sqrt(after**2 - noise**2)
    options = {k: v for k, v, usual in (("beta_unit", unit, 0), ("eta", eta, 1)) if v != usual}
    table = (np.arange(len(drop)), np.ones(len(drop)), drop, noise)
    return _plan("ancestral", sigmas, table, True, _prior(sigmas, start_scale, start_shift), options)


def ddim(sigmas: Sigmas, eta: float = 0.0, start_scale: float | None = None, start_shift: Shift = 0.0) -> Plan:
    """DDIM (arXiv 2010.02502), one row at each of sigmas [L]; eta in [0, 1] is the share of the ancestral noise.

    eta 0 is the Euler step of the probability flow in σ, without noise after the start; eta 1 is ``ancestral``.
    """
    sigmas = check_sigmas(sigmas)
    eta = check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    now, after = sigmas[:-1], sigmas[1:]
    noise = eta * after * np.sqrt(1 - (after / now) ** 2)
    drift = now**2 - now * np.sqrt(after**2 - noise**2)
    table = (np.arange(len(now)), np.ones(len(now)), drift, noise)
    return _plan("ddim", sigmas, table, True, _prior(sigmas, start_scale, start_shift), {"eta": eta})


def _plan(name, sigmas: Sigmas, table, denoise, start_law, options) -> Plan:
    """Rows (level, a, b, c), and the denoising row (1, σ_L², 0) at the last level if asked for."""
    level, a, b, c = table
    if denoise:
        level = np.append(level, len(sigmas) - 1)
        a, b, c = np.append(a, 1.0), np.append(b, sigmas[-1] ** 2), np.append(c, 0.0)
    start, scale, shift = start_law
    scale, shift = check_number("start_scale", scale), check_shift("start_shift", shift)
    return Plan(level, sigmas[level], a, b, c, None, start, scale, shift, name, options)


def _prior(sigmas: Sigmas, start_scale, start_shift) -> tuple[str, float, float]:
    """shift + σ_1·N(0, 1) unless told otherwise: the law of heavily noised data around ``start_shift``."""
    return "normal", sigmas[0] if start_scale is None else start_scale, start_shift
