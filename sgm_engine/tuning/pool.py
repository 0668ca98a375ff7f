"""Candidates drawn by Ray's actors: the crew of jobs, which outlives lost nodes (jobs/ray_crew.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgm_engine.errors import Divergence
from sgm_engine.evaluation.draw import drawn
from sgm_engine.jobs.ray_pool import PATIENCE, RaySource
from sgm_engine.models.conditioning import conditioned
from sgm_engine.plans.plan import Plan

Task = tuple[Plan, range, int]  # sample ids and seed of what is drawn by a plan
Answer = tuple[list[Tensor], list[Divergence]]  # blocks as of evaluation/draw.py, and what diverged


class Pool:
    """geometry: how the actors compute. Actors stay from one ``draw`` to the next, until ``close``."""

    def __init__(
        self,
        model: Callable,
        options: dict[str, Any],
        address: str = "local",
        actors: int | None = None,
        patience: float = PATIENCE,
    ):
        """options: of Engine, with ``device``. The others as of ray_job. ValueError: no actor can be made."""
        make = partial(PlanPainter, model, options)
        self._source = RaySource(make, address, actors, options["device"], patience)
        self.geometry = self._source.describe()

    def draw(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Answer]]:
        """(place among the tasks, its answer), as they get finished."""
        args_of = lambda place: (as_text(tasks[place]), place, None)  # noqa: E731
        for place, (blocks, lost) in self._source.crew.draw(
            b"", range(len(tasks)), args_of, stopped=lambda: False, stay=True
        ):
            yield place, ([torch.tensor(block) for block in blocks], lost)

    def close(self) -> None:
        self._source.crew.close()


class PlanPainter:
    """What runs in an actor: any plan, by the model conditioned as the plan wants it."""

    def __init__(self, model: Callable, options: dict[str, Any]):
        import sgm_engine
        from sgm_engine.engine.engine import Engine
        from sgm_engine.jobs.spec import Geometry

        if options["device"] == "auto":
            options = options | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        self.model, self.engine_for = model, lambda model: Engine(model, **options)
        geometry = Geometry.of(self.engine_for(model))
        self.about = vars(geometry) | {"sgm-engine": sgm_engine.__version__}, geometry

    def draw(self, job: bytes, task: str) -> tuple[list, list[Divergence]]:
        plan, first, stop, seed = json.loads(task)
        model, plan = conditioned(self.model, Plan.from_json(plan))
        lost: list[Divergence] = []
        blocks = list(drawn(self.engine_for(model), plan, range(first, stop), seed, lost))
        return [block.numpy() for block in blocks], lost


def as_text(task: Task) -> str:
    plan, ids, seed = task
    return json.dumps([plan.to_json(), ids.start, ids.stop, seed])
