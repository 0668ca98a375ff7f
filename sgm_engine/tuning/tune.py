"""The search and its confirmation on held-out seeds: plans in, an Outcome out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from sgm_engine.data.sets import ImageSet
from sgm_engine.engine.engine import Engine
from sgm_engine.evaluation.distances import mmd, sliced_wasserstein
from sgm_engine.evaluation.draw import drawn
from sgm_engine.evaluation.evaluate import MMD_VECTORS, Summary, summarise
from sgm_engine.evaluation.features import Extractor
from sgm_engine.evaluation.frechet import frechet, frechet_difference, frechet_distance
from sgm_engine.evaluation.report import Estimate
from sgm_engine.files.reading import open_safetensors
from sgm_engine.models.conditioning import conditioned
from sgm_engine.plans.plan import Plan
from sgm_engine.tuning.front import Outcome, Point, label
from sgm_engine.tuning.kept import Key
from sgm_engine.tuning.pool import Answer, Pool
from sgm_engine.tuning.search import Trial, front, halve

Tell = Callable[[int], object]
NAMES = {"frechet": "Fréchet distance", "sliced": "sliced W1", "mmd": "squared MMD"}


@dataclass
class Drawn:
    """Samples that exist already, and the plan that drew them."""

    images: ImageSet
    plan: Plan


class Tuner:
    """Measures plans against one reference. engine_for(model): an engine of it.

    measure: "frechet", "sliced" or "mmd"; lower is better. kept: figures that were measured before; gets the others.
    pool: draws instead of engine_for, many plans at a time; the samples are the same.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        engine_for: Callable[[Callable[[Tensor, Tensor], Tensor]], Engine],
        extractor: Extractor,
        reference: Summary,
        measure: str = "frechet",
        kept: MutableMapping[Key, list] | None = None,
        pool: Pool | None = None,
    ):
        if measure not in NAMES:
            raise ValueError(f"measure must be one of {', '.join(NAMES)}, got {measure!r}")
        self.model, self.engine_for = model, engine_for
        self.extractor, self.reference, self.measure = extractor, reference, measure
        self._target = reference.moments.moments()
        self.kept = {} if kept is None else kept
        self.pool, self._ready = pool, dict[tuple[str, range, int], Answer]()

    def search(
        self,
        plans: list[Plan],
        seed: int,
        first: int,
        last: int,
        report: Callable[[str], object] = lambda line: None,
        one: bool = False,
        tell: Tell = lambda n: None,
    ) -> list[Trial]:
        """The survivors of successive halving, with ``last`` samples each of ``seed``; one: the best alone, by quality
        whatever its evaluations. tell: told of evaluations done."""

        def extend(trial: Trial, n: int) -> None:
            key = "search", seed, n, trial.plan.digest
            trial.ahead.append(n)
            if key in self.kept:
                tell((n - trial.n) * trial.plan.nfe)
            else:
                lost = self._catch_up(trial, seed, tell) or (trial.n and np.isinf(trial.quality))
                self.kept[key] = [float("inf") if lost else self.quality(trial.summary)]
            (trial.quality,), trial.n = self.kept[key], n

        def order(trials: list[Trial], n: int) -> Iterator[Trial]:
            def wants(trial: Trial) -> list[range]:
                known = ("search", seed, n, trial.plan.digest) in self.kept
                ends = [trial.drawn, *trial.ahead, n]
                return [] if known else [range(*pair) for pair in pairwise(ends)]

            return self._as_drawn(trials, wants, seed)

        trials = [Trial(plan, Summary(self.extractor, plan.name)) for plan in plans]
        if not one:
            return halve(trials, extend, first, last, report=report, order=order)
        alive = halve(trials, extend, first, last, report=report, goals=lambda t: (0.0, t.quality), order=order)
        return [min(alive, key=lambda t: t.quality)]

    def _catch_up(self, trial: Trial, seed: int, tell: Tell) -> list:
        """Draw what the summary lacks, in the same steps as ever; the samples that diverged."""
        lost: list = []
        for n in trial.ahead:
            told = tell if n == trial.ahead[-1] else lambda n: None  # the others were told of when they were found
            for block in self._draw(trial.plan, range(trial.drawn, n), seed, lost, told):
                trial.summary.update(block)
            trial.drawn = n
        trial.ahead.clear()
        return lost

    def quality(self, summary: Summary) -> float:
        if self.measure == "frechet":
            return frechet_distance(self._target, summary.moments.moments())
        return self._estimate(summary, 2).value

    def confirm(
        self,
        survivors: list[Trial],
        seed: int,
        n: int,
        floor: Summary | None = None,
        baseline: Plan | Drawn | None = None,
        report: Callable[[str], object] = lambda line: None,
        tell: Tell = lambda n: None,
    ) -> Outcome:
        """The front of the survivors, each of its plans drawn again from a held-out ``seed``.

        The chosen plan is the survivor of the best quality in the search; its figure here is of samples that had no
        part in the choice. ValueError if every survivor diverged.
        """
        best = finalists(survivors)
        if not best:
            raise ValueError("every plan that survived the search diverged: lower the step sizes or check the model")
        points, of_chosen, difference = [], None, None
        compared = baseline is not None and self.measure == "frechet"

        def key_of(trial: Trial) -> Key:
            return "held out", seed, n, trial.plan.digest

        def wanted(trial: Trial) -> bool:  # the last has the best quality
            return key_of(trial) not in self.kept or (trial is best[-1] and compared)

        for trial in self._as_drawn(best, lambda t: [range(n)] * wanted(t), seed):
            chosen, key = trial is best[-1], key_of(trial)
            if wanted(trial):
                summary = self._held_out(trial.plan, seed, n, tell)
                of_chosen = summary if chosen else of_chosen
                if key not in self.kept:
                    self.kept[key] = list(self._estimate(summary))
            else:
                tell(n * trial.plan.nfe)
            estimate = Estimate(*self.kept[key])
            points.append(
                Point(label(trial.plan), trial.plan.nfe, estimate, "chosen" if chosen else "front", trial.plan)
            )
            report(f"held out: {trial.plan.nfe} NFE  {estimate.value:.4g}  {trial.plan.name}")
        if baseline is not None:
            plan = baseline.plan if isinstance(baseline, Drawn) else baseline
            blocks = baseline.images.blocks() if isinstance(baseline, Drawn) else None
            summary = summarise(blocks, self.extractor) if blocks else self._held_out(plan, seed, n, tell)
            points.append(Point(label(plan), plan.nfe, self._estimate(summary), "baseline", plan))
            if compared:
                difference = frechet_difference(of_chosen.moments, summary.moments, self.reference.moments)
        points.sort(key=lambda p: p.nfe)
        least = None if floor is None else self._estimate(floor, 2).value
        return Outcome(points, NAMES[self.measure], self.reference.name, n, least, difference, {})

    def _as_drawn(self, trials: list[Trial], wants: Callable[[Trial], list[range]], seed: int) -> Iterator[Trial]:
        """The trials as the pool gets what they want, which is then ready for ``_draw``; without one as they are."""
        if self.pool is None:
            yield from trials
            return
        wanted = {trial.plan.digest: wants(trial) for trial in trials}
        yield from (trial for trial in trials if not wanted[trial.plan.digest])
        tasks = [(trial.plan, ids, seed) for trial in trials for ids in wanted[trial.plan.digest]]
        owners = [trial for trial in trials for _ in wanted[trial.plan.digest]]
        for place, answer in self.pool.draw(tasks):
            plan, ids, _ = tasks[place]
            self._ready[plan.digest, ids, seed] = answer
            wanted[plan.digest].remove(ids)
            if not wanted[plan.digest]:
                yield owners[place]

    def _draw(self, plan: Plan, ids: range, seed: int, lost: list, tell: Tell) -> Iterator[Tensor]:
        if (answer := self._ready.pop((plan.digest, ids, seed), None)) is not None:
            lost += answer[1]
            tell(len(ids) * plan.nfe)
            return iter(answer[0])
        model, plan = conditioned(self.model, plan)
        return drawn(self.engine_for(model), plan, ids, seed, lost, tell=tell)

    def _held_out(self, plan: Plan, seed: int, n: int, tell: Tell) -> Summary:
        lost: list = []
        summary = summarise(self._draw(plan, range(n), seed, lost, tell), self.extractor, plan.name)
        if lost:
            raise ValueError(f"{len(lost)} of {n} held-out samples of {label(plan)} diverged: {lost[0]}")
        return summary

    def _estimate(self, summary: Summary, replicates: int = 200) -> Estimate:
        if self.measure == "frechet":
            return frechet(summary.moments, self.reference.moments, interval=replicates > 2)
        x, y = summary.vectors.rows(), self.reference.vectors.rows()
        if self.measure == "sliced":
            return sliced_wasserstein(x, y, replicates=replicates)
        x, y = summary.vectors.rows(MMD_VECTORS), self.reference.vectors.rows(MMD_VECTORS)
        return mmd(x, y, permutations=2, replicates=replicates)


def finalists(survivors: list[Trial]) -> list[Trial]:
    """Those that are drawn again from a held-out seed: the front of the trials that did not diverge."""
    return front([t for t in survivors if np.isfinite(t.quality)], lambda t: (t.plan.nfe, t.quality))


def plan_of_samples(path: Path) -> Plan:
    """The plan that a .safetensors of samples (or the first one of a folder) was drawn by."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors samples say which plan drew them")
    with open_safetensors(files[0], "np") as file:
        text = (file.metadata() or {}).get("plan")
    if text is None:
        raise ValueError(f"{files[0]} does not say which plan drew its samples")
    return Plan.from_json(text)
