"""What can be said of a plan before it runs: whether it must diverge, the law of what it draws, a table, a figure.

The laws are exact for Gaussian data N(μ, v): there the score is linear, and a plan is a linear recursion.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sgm_engine.files.writing import staged
from sgm_engine.plans.schedule import Sigmas, check_sigmas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROWTH = 100.0  # of the distance to a single data point; plans that do worse are refused


class Plan(Protocol):
    """What is read of a plan here; plan.py has the class."""

    name: str
    metadata: Mapping[str, object]
    nfe: int
    level: np.ndarray
    sigma: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray
    e: np.ndarray
    f: np.ndarray
    adaptive: np.ndarray
    stores: np.ndarray
    start: str
    start_scale: float
    start_shift: float | np.ndarray


class Shown:
    """What a plan shows of itself."""

    def __repr__(self) -> str:
        return summary(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def describe(self, sigmas: Sigmas | None = None) -> str:
        """The table as text, runs of equal rows on one line, below what examine(plan, sigmas) finds."""
        return describe(self, sigmas)

    def plot(self, path: str | os.PathLike | None = None, sigmas: Sigmas | None = None) -> Figure:
        """The table as a figure (matplotlib), saved to ``path`` if given: noise, step and history over the rows."""
        return plot(self, path, sigmas)


def propagate(plan: Plan, variance: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The law of x − μ before each row and after the last, for data N(μ, variance): (factor [R+1], std [R+1]).

    factor: what the start's mean x₀ − μ has been multiplied by. std: of one pixel over samples, for start_shift = μ.
    An adaptive row is taken at the score's expected norm.
    """
    total = plan.sigma**2 + variance
    r2 = np.where(plan.adaptive == 1, 1 / total, 1.0)
    b, c = plan.b / r2, plan.c / np.sqrt(r2)
    start = plan.start_scale**2 * (1 / 12 if plan.start == "uniform" else 1.0)
    mean, law = np.array([1.0, 0.0]), np.diag([start, 0.0])  # of (x − μ, previous − its value at x = μ)
    factors, stds = [1.0], [np.sqrt(start)]
    for i in range(plan.nfe):
        keep = plan.stores[i]
        step = np.array(
            [
                [plan.a[i] - b[i] / total[i], plan.d[i]],
                [plan.e[i] - plan.f[i] / total[i] if keep else 0.0, 0.0 if keep else 1.0],
            ]
        )
        with np.errstate(over="ignore", invalid="ignore"):
            mean, law = step @ mean, step @ law @ step.T
            law[0, 0] += c[i] ** 2
            factors.append(mean[0])
            stds.append(np.sqrt(law[0, 0]))
    return np.array(factors), np.array(stds)


def refuse_unstored(plan: Plan) -> None:
    use, store = np.flatnonzero(plan.d), np.flatnonzero(plan.stores)
    if len(use) and (not len(store) or use[0] <= store[0]):
        raise ValueError(
            f"d[{use[0]}] = {plan.d[use[0]]:g} uses previous, which no row before it stores: give one an e or f"
        )


def refuse_divergence(plan: Plan, curvature: np.ndarray | float = 0.0) -> None:
    """Data that is one point has score (μ − x)/σ², so a row scales the distance to it by a − b/σ² (when d = 0).

    curvature: what terms beside the model add to 1/σ² at each row. ValueError names the first row that must diverge.
    """
    ratio = np.where(plan.adaptive == 1, plan.b, plan.b * (1 / plan.sigma**2 + curvature))
    bad = np.flatnonzero((plan.d == 0) & (plan.a - ratio <= -1 + 1e-9))
    if len(bad):
        i = bad[0]
        what = "b/sigma²" if np.ndim(curvature) == 0 else "b·(1/sigma² + the curvature of the terms)"
        step, share = plan.metadata.get("step_lr"), (1 + plan.a[i]) / ratio[i]
        remedy = f"make it smaller, below {share * plan.b[i]:.3g}"
        if isinstance(step, float) and i + 1 < plan.nfe:  # the last row may be the denoising one
            remedy = f"take a step_lr below {share * step:.3g}, it is {step:g}"
        raise ValueError(
            f"b[{i}] = {plan.b[i]:g} must diverge at sigma[{i}] = {plan.sigma[i]:g}: {what} is {ratio[i]:.3g} and has "
            f"to stay below 1 + a = {1 + plan.a[i]:g}; {remedy}"
        )
    if plan.d.any():
        factor = np.abs(propagate(plan)[0])
        if not factor.max() < GROWTH:
            i = int(np.argmax(~(factor < GROWTH))) - 1
            raise ValueError(
                f"the rows up to {i} (a, b, d, e, f) must diverge: data at one point would be left {factor[i + 1]:.3g} "
                "times as far away as at the start; take more steps or a method without previous (d = 0)"
            )


@dataclass(frozen=True)
class Examination:
    """What ``examine`` found.

    nfe: network evaluations a sample. residual: std of the noise left in a sample of one-point data, in units of x.
    narrowing: std of the samples of N(0, 1) data, 1 if the plan were exact. start: std of the start in units of x.
    prior: what it should be, the first row's sigma. remarks: what deserves a look, in words.
    """

    nfe: int
    residual: float
    narrowing: float
    start: float
    prior: float
    remarks: tuple[str, ...]


def examine(plan: Plan, sigmas: Sigmas | None = None) -> Examination:
    """What the plan will do, without running it; with the model's ``sigmas`` [L], whether it fits them."""
    residual, unit = propagate(plan)[1], propagate(plan, 1.0)[1]
    remarks = []
    start, prior = residual[0], float(plan.sigma[0])
    if plan.start == "normal" and not 0.8 <= start / prior <= 1.5:
        remarks.append(f"the start's std {start:.4g} is far from the first row's sigma {prior:.4g}")
    # Within Langevin steps at a level the noise settles above its sigma; far above, the next level does not know it.
    excess = residual[:-1] / plan.sigma
    worst = int(np.argmax(excess[1:])) + 1 if plan.nfe > 1 else 0
    if excess[worst] > 3 and plan.start == "normal":
        remarks.append(f"row {worst} gets {excess[worst]:.3g} times the noise of its sigma {plan.sigma[worst]:.4g}")
    if sigmas is not None:
        sigmas = check_sigmas(sigmas)
        if plan.level.max() >= len(sigmas):
            remarks.append(f"level {plan.level.max()} is not among the model's {len(sigmas)}")
        else:
            off = np.abs(np.log(plan.sigma / sigmas[plan.level]))
            if off.max() > 1e-6:
                i = int(off.argmax())
                remarks.append(f"row {i} has sigma {plan.sigma[i]:.4g}, its level {sigmas[plan.level[i]]:.4g}")
    return Examination(plan.nfe, float(residual[-1]), float(unit[-1]), float(start), prior, tuple(remarks))


def describe(plan: Plan, sigmas: Sigmas | None = None) -> str:
    names = ["sigma", "a", "b", "c", "d", *(n for n in ("e", "f", "adaptive") if getattr(plan, n).any())]
    table = np.stack([plan.level, *(getattr(plan, name) for name in names)], 1)
    first = [0, *(np.flatnonzero((table[1:] != table[:-1]).any(1)) + 1)]
    found = examine(plan, sigmas)
    lines = [
        f"{plan.name}: {plan.nfe} network evaluations a sample; start {start_words(plan)}",
        f"noise left in a sample: {found.residual:.3g}; data N(0, 1) comes out with std {found.narrowing:.4g}",
        *(f"note: {remark}" for remark in found.remarks),
        f"{'rows':>11} {'level':>5} " + " ".join(f"{name:>10}" for name in names),
    ]
    for i, j in zip(first, [*first[1:], plan.nfe], strict=True):
        rows = f"{i}" if j == i + 1 else f"{i}–{j - 1}"
        lines.append(f"{rows:>11} {plan.level[i]:>5} " + " ".join(f"{value:>10.5g}" for value in table[i, 1:]))
    return "\n".join(lines)


def plan_words(plan: Plan, digits: int = 17) -> str:
    """name(options), without the sigmas that it was made from. digits: of a number, at most."""
    options = {k: v for k, v in plan.metadata.items() if k != "path"}
    options |= {k: f"{v:.{digits}g}" for k, v in options.items() if isinstance(v, float) and digits < 17}
    return f"{plan.name}({', '.join(f'{k}={v}' for k, v in options.items())})"


def start_words(plan: Plan) -> str:
    """Where its chains begin, such as 0.13 + 5·N(0, 1)."""
    shift = plan.start_shift
    mean = f"{shift:g}" if np.ndim(shift) == 0 else f"a mean of each pixel (around {np.mean(shift):.3g})"
    return f"{mean} + {plan.start_scale:.6g}·{'U[0, 1)' if plan.start == 'uniform' else 'N(0, 1)'}"


def summary(plan: Plan) -> str:
    """The repr of a plan: one line."""
    return (
        f"<Plan {plan.name}: {plan.nfe} evaluations, σ {plan.sigma[0]:.4g} → {plan.sigma[-1]:.3g}, "
        f"start {start_words(plan)}>"
    )


def as_html(plan: Plan) -> str:
    """What a notebook shows: the table as text, and its figure where matplotlib is installed."""
    text = f"<pre>{html.escape(describe(plan))}</pre>"
    buffer = io.BytesIO()
    try:
        plot(plan).savefig(buffer, format="png", dpi=72)
    except RuntimeError:  # without matplotlib
        return text
    return f'{text}<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def check_label(name: object, metadata: object) -> None:
    """ValueError unless these can be printed: both come from files."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
        raise ValueError(f"name must be at most 200 characters that can be printed, got {name!r:.60}")
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata must be an object of names and values, got {metadata!r:.60}")


def plot(plan: Plan, path: str | os.PathLike | None = None, sigmas: Sigmas | None = None) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plan.plot() needs matplotlib ({error}): pip install 'sgm-engine[plot]'") from error
    rows, std = np.arange(plan.nfe), propagate(plan)[1]
    figure = Figure(figsize=(8, 6), layout="constrained")
    noise, step = figure.subplots(2, 1, sharex=True)
    noise.semilogy(rows, plan.sigma, ".-", ms=4, label="σ that the network is told")
    noise.semilogy(np.arange(plan.nfe + 1), np.maximum(std, 1e-12), "--", lw=1, label="noise in x (one-point data)")
    for sigma in check_sigmas(sigmas) if sigmas is not None else ():
        noise.axhline(sigma, lw=0.3, color="0.6", zorder=0)
    noise.set(ylabel="units of x", title=f"{plan.name}, {plan.nfe} network evaluations")
    for name, values in (("b/σ²", plan.b / plan.sigma**2), ("c/σ", plan.c / plan.sigma), ("d", plan.d)):
        if values.any():
            step.plot(rows, values, ".-", ms=4, lw=0.8, label=name)
    step.set(xlabel="row", ylabel="of one row")
    for axes in (noise, step):
        axes.legend()
        axes.grid(alpha=0.3)
    if path is not None:
        with staged(path) as file:
            figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=120)
    return figure
