"""What runs in Ray's actors: an engine that draws one shard at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from sgm_engine.errors import Divergence
from sgm_engine.outputs.sample_ids import SampleIds
from sgm_engine.plans.plan import Plan


def actor_class() -> type:
    """The class of the actors. It travels by value and names nothing of this package, so that a node which lacks the
    package, or has another one, can say so."""

    class Painter:
        def __init__(self, make: bytes):
            """make: a pickled function whose result has ``about`` (what must agree, what it is) and ``draw``."""
            self._make = make

        def hello(self) -> tuple[tuple[str, str, int], str | None, bytes | None]:
            """((node, its name, process id), why there is no painter, its pickled ``about``)."""
            import os
            import socket

            import ray

            where = ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid()
            try:
                self._painter, self._make = ray.cloudpickle.loads(self._make)(), None
                return where, None, ray.cloudpickle.dumps(self._painter.about)
            except BaseException as error:
                return where, " ".join(f"{type(error).__name__}: {error}".split()), None

        def draw(self, job: bytes, ids: str, shard: int, write: bytes | None) -> tuple:
            """write: a pickled function that puts the shard where it belongs, and gives back what is to be told."""
            drawn = self._painter.draw(job, ids)
            if write is None:
                return drawn
            import ray

            return ray.cloudpickle.loads(write)(shard, *drawn)

    return Painter


class EnginePainter:
    """Shards drawn by ``Engine(model, **options)``."""

    def __init__(self, model: Callable, options: dict[str, Any], plan: Plan | None):
        import torch

        import sgm_engine
        from sgm_engine.engine.engine import Engine
        from sgm_engine.jobs.source import EngineSource
        from sgm_engine.jobs.spec import Geometry

        if options["device"] == "auto":
            options = options | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        self.engine = Engine(model, **options)
        self.source = EngineSource(self.engine, weights="the driver's")
        self._job, self._spec = b"", None
        geometry = Geometry.of(self.engine)
        what = geometry, self.engine.shape, self.engine.data_range, self.engine._check(plan, None)
        self.about = vars(geometry) | {"sgm-engine": sgm_engine.__version__}, what

    def draw(self, job: bytes, ids: str) -> tuple[np.ndarray, np.ndarray, list[Divergence]]:
        """job: the pickled JobSpec, its ids left out. ids: those of the shard."""
        import ray

        if job != self._job:
            self._job, self._spec = job, ray.cloudpickle.loads(job)
        mine = SampleIds.parse(ids)
        spec = replace(self._spec, ids=mine, shard_size=len(mine))
        (drawn,) = self.source.draw(spec, [0], settle=lambda: None, stopped=lambda: False, bar=False)
        return drawn.ids, drawn.samples, drawn.diverged
