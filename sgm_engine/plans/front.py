"""The front that travels with weights: tuned plans by evaluations, and what was measured of each.

A plan is kept as its recipe: the sampler's name, its sigmas and options. Where a chain starts follows from the data's
law (law.py), which travels beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from sgm_engine.files.reading import parse_json
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.samplers import SAMPLERS, levels_of_nfe, options_of
from sgm_engine.plans.schedule import check_number, check_sigmas, nearest_level
from sgm_engine.plans.steps import check_steps
from sgm_engine.plans.steps import words as words_of_steps

Start = Callable[[float], Mapping[str, object]]  # σ → where chains begin at that noise, as options of a sampler

QUALITIES = ("draft", "good", "best")
TEXTS = ("measure", "reference", "features", "precision", "command")
ALIKE = ("measure", "reference", "features", "precision", "n", "seed")
MAX_POINTS, MAX_NFE, MAX_TEXT, BAR = 64, 10_000, 100_000, 24
OWN = 1e-5  # of log σ: what float32 makes of a level


@dataclass(frozen=True)
class Point:
    """recipe: {"name": a sampler, "sigmas": [L], descending, and its options}. value: measured, lower is better, with
    a 95% interval: its own, or that of ``corrected``, the value without the bias of a finite number of samples.
    ValueError names what is wrong."""

    nfe: int
    value: float
    low: float
    high: float
    recipe: Mapping[str, object]
    corrected: float | None = None

    def __post_init__(self) -> None:
        if type(self.nfe) is not int or not 1 <= self.nfe <= MAX_NFE:
            raise ValueError(f"nfe must be an integer from 1 to {MAX_NFE:,}, got {self.nfe!r}")
        for name in ("value", "low", "high") + ("corrected",) * (self.corrected is not None):
            if not np.isfinite(check_number(name, getattr(self, name))):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if not isinstance(self.recipe, Mapping) or self.recipe.get("name") not in SAMPLERS:
            raise ValueError(f"a plan's name must be one of {', '.join(SAMPLERS)}, got {self.recipe!r:.60}")
        if not isinstance(self.recipe.get("sigmas"), list):
            raise ValueError(f"a plan's sigmas must be a list of numbers, got {self.recipe.get('sigmas')!r:.60}")
        known = {"name", "sigmas", *options_of(self.recipe["name"])}
        if unknown := sorted(map(str, self.recipe.keys() - known)):
            raise ValueError(f"a plan of {self.recipe['name']} takes no {', '.join(unknown)}")

    @property
    def sigmas(self) -> np.ndarray:
        return check_sigmas(self.recipe["sigmas"])

    def on_own_levels(self, levels) -> bool:
        """Whether its sigmas are among these levels [L]."""
        sigmas, levels = self.sigmas, check_sigmas(levels)
        return bool(np.abs(np.log(sigmas / levels[nearest_level(sigmas, levels)])).max() < OWN)

    def plan(self, start: Start) -> Plan:
        """The plan, its rows at its own sigmas. ValueError if it has another number of rows than ``nfe``."""
        sigmas, options = self.sigmas, {k: v for k, v in self.recipe.items() if k not in ("name", "sigmas")}
        name = self.recipe["name"]
        if levels_of_nfe(name, self.nfe, options) != len(sigmas):
            raise ValueError(f"{name} of {len(sigmas)} sigmas does not take nfe = {self.nfe} evaluations")
        return SAMPLERS[name](sigmas, **started(name, start(float(sigmas[0]))) | options)

    def words(self) -> str:
        """The plan in a few words."""
        name, sigmas = self.recipe["name"], self.sigmas
        where = f"{len(sigmas)} σ {sigmas[0]:.3g} → {sigmas[-1]:.3g}"
        shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.recipe.items()
                 if k not in ("name", "sigmas"))  # fmt: skip
        return f"{name}: {', '.join([where, *shown])}"


@dataclass(frozen=True)
class Front:
    """points: by evaluations, ascending, no two of one number. measure: what value is, of n samples of ``seed`` to
    ``reference`` in ``features``, computed in ``precision``; command: what measured it. steps: how
    a sampler that is named by itself steps with these weights (steps.py)."""

    points: tuple[Point, ...]
    measure: str
    reference: str
    features: str
    precision: str
    command: str
    n: int
    seed: int
    steps: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(self.points))
        object.__setattr__(self, "steps", check_steps(self.steps))
        if not 1 <= len(self.points) <= MAX_POINTS:
            raise ValueError(f"a front must have 1 to {MAX_POINTS} points, got {len(self.points)}")
        if (rows := [p.nfe for p in self.points]) != sorted(set(rows)):
            raise ValueError(f"a front's points must be of rising evaluations, got {rows}")
        for name in TEXTS:
            text = getattr(self, name)
            if not isinstance(text, str) or not text.isprintable() or len(text) > MAX_TEXT:
                most = f"at most {MAX_TEXT:,} characters"
                raise ValueError(f"{name} must be {most} that can be printed, got {text!r:.60}")
        for name in ("n", "seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {getattr(self, name)!r}")

    def within(self, nfe: int) -> Point | None:
        """The best of at most ``nfe`` evaluations; None where all take more."""
        return min((p for p in self.points if p.nfe <= nfe), key=lambda p: (p.value, p.nfe), default=None)

    def named(self, quality: str) -> Point:
        """draft: the fewest evaluations. best: the lowest value. good: the trade, the fewest evaluations whose interval
        has no other one wholly below it."""
        if quality not in QUALITIES:
            raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
        if quality == "best":
            return self.within(self.points[-1].nfe)
        if quality == "draft":
            return self.points[0]
        return next(p for p in self.points if all(q.high >= p.low for q in self.points))

    def on_own_levels(self, levels) -> Front | None:
        """The part of it that keeps to these levels, None where nothing does."""
        own = [p for p in self.points if p.on_own_levels(levels)]
        return replace(self, points=own) if own else None

    def beside(self, other: Front) -> Front:
        """The points of both that no other beats, where both were measured alike; else this front's alone. The steps of
        both, this front's first."""
        steps = {**other.steps, **self.steps}
        if any(getattr(self, name) != getattr(other, name) for name in ALIKE):
            return replace(self, steps=steps)
        kept: list[Point] = []
        for p in sorted((*self.points, *other.points), key=lambda p: (p.nfe, p.value)):
            if not kept or p.value < kept[-1].value:
                kept.append(p)
        command = self.command if self.command == other.command else f"{other.command}; {self.command}"
        return replace(self, points=kept, command=command, steps=steps)

    def table(self) -> str:
        """Text: a line a point, with a bar as long as its value."""
        most = max(p.value for p in self.points)
        biased = any(p.corrected is not None or not p.low <= p.value <= p.high for p in self.points)
        note = "; corrected and its interval: without the bias of so few samples" if biased else ""
        named = {quality: self.named(quality) for quality in QUALITIES}
        lines = [
            f"{self.measure} of {self.n:,} samples, seed {self.seed}, to {self.reference}: lower is better",
            f"features: {self.features}; computed in {self.precision}{note}",
            f"by: {self.command}",
            f"{'NFE':>5} {'value':>8} {'corrected':>9}  {'95% interval':<15} {'':<{BAR}}  plan",
        ]
        for p in self.points:
            bar = "█" * max(1, round(BAR * p.value / most)) if most > 0 else ""
            names = ", ".join(quality for quality, point in named.items() if point is p)
            interval = f"{p.low:.3g} … {p.high:.3g}"
            corrected = "" if p.corrected is None else f"{p.corrected:.3f}"
            lines.append(f"{p.nfe:>5} {p.value:>8.3f} {corrected:>9}  {interval:<15} {bar:<{BAR}}  {p.words()}"
                         + (f"  ({names})" if names else ""))  # fmt: skip
        lines += [f"--sampler {name}: {words_of_steps(rule)}" for name, rule in self.steps.items()]
        return "\n".join(lines)

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in (*TEXTS, "n", "seed")}
        fields |= {"steps": self.steps} if self.steps else {}
        points = [{**vars(p), "recipe": dict(p.recipe)} for p in self.points]
        return json.dumps(fields | {"points": points}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Front:
        """ValueError says why a text is refused."""
        fields = parse_json(text)
        if not isinstance(fields, Mapping) or fields.keys() - {"steps"} != {*TEXTS, "n", "seed", "points"}:
            raise ValueError(f"a front must have {', '.join(TEXTS)}, n, seed and points, got {str(fields)[:60]!r}")
        points = fields.pop("points")
        if not isinstance(points, list) or any(
            not isinstance(p, Mapping) or {*p, "corrected"} != set(Point.__dataclass_fields__) for p in points
        ):
            raise ValueError(f"a front's points must have {', '.join(Point.__dataclass_fields__)}")
        return cls(tuple(Point(**p) for p in points), **fields)


def recipe_of(plan: Plan, levels, start: Start) -> dict[str, object]:
    """The recipe that makes ``plan``, where chains begin at ``start``.

    plan.metadata["path"]: the sigmas that it was made from; without it the model's levels [L]. ValueError: no sampler
    with the options that the plan names makes it.
    """
    if plan.name not in SAMPLERS:
        raise ValueError(f"{plan.name} is the name of no sampler, so the plan cannot travel as one")
    known = set(options_of(plan.name)) - {"start", "start_scale", "start_shift"}
    recipe = {"name": plan.name} | {k: v for k, v in plan.metadata.items() if k in known and v is not None}
    recipe["sigmas"] = check_sigmas(plan.metadata.get("path", levels)).tolist()
    own = {"start_scale": plan.start_scale, "start_shift": plan.start_shift}
    own |= {"start": plan.start} if plan.name == "annealed_langevin" else {}
    for extra in ({}, own):  # the law's start, or the plan's own
        point = Point(plan.nfe, 0.0, 0.0, 0.0, recipe | extra)
        try:
            made = point.plan(start)
        except ValueError:
            break
        if np.array_equal(_table(made), _table(plan)) and _law(made) == _law(plan):
            return dict(point.recipe)
    raise ValueError(f"{plan.name} with the options that it names is not this plan of {plan.nfe} rows")


def started(name: str, start: Mapping[str, object]) -> dict[str, object]:
    """``start`` as options of the sampler ``name``."""
    return dict(start) | ({"start": "normal"} if name == "annealed_langevin" and start else {})


def _table(plan: Plan) -> np.ndarray:
    return np.stack([plan.sigma, *(getattr(plan, name) for name in "abcdef"), plan.adaptive])


def _law(plan: Plan) -> tuple:
    return plan.start, plan.start_scale, np.asarray(plan.start_shift).tolist()
