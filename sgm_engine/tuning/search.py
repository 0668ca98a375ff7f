"""Successive halving over plans, two goals at once: few evaluations and good samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sgm_engine.evaluation.evaluate import Summary
from sgm_engine.plans.plan import Plan

T = TypeVar("T")


@dataclass
class Trial:
    """A plan on its way through the search: what is kept of its samples, ids 0 … n − 1, and how good they are.

    quality: lower is better; infinite where a sample diverged. ahead: the steps, in samples, that the summary has
    yet to catch up with; their quality was known.
    """

    plan: Plan
    summary: Summary
    quality: float = float("inf")
    n: int = 0
    drawn: int = 0  # samples in the summary
    ahead: list[int] = field(default_factory=list)


def halve(
    trials: Sequence[Trial],
    extend: Callable[[Trial, int], None],
    first: int,
    last: int,
    keep: float = 0.5,
    report: Callable[[str], object] = lambda line: None,
    goals: Callable[[Trial], tuple[float, float]] = lambda t: (t.plan.nfe, t.quality),
    order: Callable[[list[Trial], int], Iterable[Trial]] = lambda trials, n: trials,
) -> list[Trial]:
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) with Pareto layers for ranks.

    extend(trial, n): draw its samples up to id n − 1, set n and quality. Every trial gets ``first`` samples; the best
    share ``keep`` of them twice as many, and so on until the survivors have ``last``. Best: the Pareto front of the
    two ``goals``, then the front of the rest, and so on. Samples are drawn once: a survivor keeps its own.
    order(trials, n): the trials in the order in which they can be extended; it decides nothing else.
    """
    if not 2 <= first <= last:
        raise ValueError(f"first must be at least 2 and at most last, got {first} and {last}")
    if not 0 < keep < 1:
        raise ValueError(f"keep must lie between 0 and 1, got {keep}")
    alive, n = list(trials), first
    while True:
        for trial in order(alive, n):
            extend(trial, n)
            report(f"n {n:5d}  {trial.plan.nfe:4d} NFE  quality {trial.quality:9.4g}  {trial.plan.name}")
        if n >= last:
            return alive
        alive = best(alive, max(1, round(keep * len(alive))), goals)
        n = min(2 * n, last)


def samples_of(count: int, first: int, last: int, keep: float = 0.5) -> int:
    """How many samples ``halve`` draws of ``count`` trials, all rounds together."""
    total, before, n = 0, 0, first
    while True:
        total += count * (n - before)
        if n >= last:
            return total
        count, before, n = max(1, round(keep * count)), n, min(2 * n, last)


def best(
    trials: Sequence[Trial],
    count: int,
    goals: Callable[[Trial], tuple[float, float]] = lambda t: (t.plan.nfe, t.quality),
) -> list[Trial]:
    """The ``count`` best by Pareto layers; within the layer that is cut, those of the best quality."""
    rest, kept = list(trials), []
    while rest and len(kept) < count:
        layer = front(rest, goals)
        kept += sorted(layer, key=lambda t: t.quality)[: count - len(kept)]
        rest = [t for t in rest if not any(t is member for member in layer)]
    return kept


def front(things: Sequence[T], goals: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those that none other beats: ascending in the first goal, strictly descending in the second."""
    kept: list[T] = []
    for thing in sorted(things, key=goals):
        if not kept or goals(thing)[1] < goals(kept[-1])[1]:
            kept.append(thing)
    return kept
