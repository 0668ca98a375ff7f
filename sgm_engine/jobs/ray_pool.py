"""A job's shards drawn by Ray actors, each with an engine; this process writes them. Needs the extra [ray].

Actors need no shared file system: the model goes to them, samples come back. A shard whose actor dies or fails is drawn
by another one; since shards depend on nothing but their ids, the bytes are the same.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import sgm_engine
from sgm_engine.engine.engine import Engine
from sgm_engine.errors import EngineError
from sgm_engine.jobs.identity import identity_of
from sgm_engine.jobs.job import Job, make_spec, with_scales
from sgm_engine.jobs.source import Drawn, EngineSource
from sgm_engine.jobs.spec import SHARD_SIZE, Geometry, JobSpec
from sgm_engine.outputs.images import Range
from sgm_engine.plans.plan import Plan
from sgm_engine.rewriting.float8.config import Float8Config

QUEUED = 2  # shards that an actor has at a time, so that it does not wait for this process
ATTEMPTS = 3  # at one shard
POLL = 0.2  # seconds between two looks at whether to stop


class Painter:
    """What runs in an actor."""

    def __init__(self, model: Callable, options: dict[str, Any]):
        device = options["device"]
        if device == "auto":
            import torch

            options = options | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        self.engine = Engine(model, **options)
        self.source = EngineSource(self.engine, weights="the driver's")

    def describe(self, plan: Plan | None) -> tuple[Geometry, tuple[int, int, int], Range, Plan]:
        return Geometry.of(self.engine), self.engine.shape, self.engine.data_range, self.engine._check(plan, None)

    def draw(self, spec: JobSpec, shard: int) -> Drawn:
        if spec.engine != sgm_engine.__version__:
            raise EngineError(f"the job is of sgm-engine {spec.engine}, and {sgm_engine.__version__} is installed here")
        (drawn,) = self.source.draw(spec, [shard], settle=lambda: None, stopped=lambda: False, bar=False)
        return drawn


class RaySource:
    """A pool of actors; shards come in the order in which they get finished."""

    def __init__(self, model: Callable, address: str, actors: int | None, options: dict[str, Any]):
        """address: "local" starts Ray here; "auto" or ray://host:port joins a cluster. options: of each Engine."""
        try:
            import ray
        except ImportError:
            raise ValueError("--ray needs Ray: pip install 'sgm-engine[ray]'") from None
        self._ray = ray
        settings = {k: v for k, v in os.environ.items() if k.startswith("SGM_")}
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if not ray.is_initialized():
            ray.init(address=address, **quiet, **({"include_dashboard": False} if address == "local" else {}))
        gpus = int(ray.cluster_resources().get("GPU", 0)) if options["device"] != "cpu" else 0
        if options["device"] == "cuda" and not gpus:
            raise ValueError("device='cuda': there is no GPU in this Ray cluster")
        needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        self._remote = ray.remote(Painter).options(max_restarts=0, runtime_env={"env_vars": settings}, **needs)
        self._model, self._options = ray.put(model), options
        self.actors = [self._start() for _ in range(actors or gpus or int(ray.cluster_resources().get("CPU", 1)))]

    def describe(self, plan: Plan | None) -> tuple[Geometry, tuple[int, int, int], Range, Plan]:
        try:
            return self._ray.get(self.actors[0].describe.remote(plan))
        except self._ray.exceptions.RayError as error:
            raise ValueError(f"an actor could not be made: {_why(error)}") from None

    def cancel(self) -> None:
        """``draw`` looks by itself, every POLL seconds."""

    def draw(
        self,
        spec: JobSpec,
        shards: Sequence[int],
        settle: Callable[[], None],
        stopped: Callable[[], bool],
        bar: bool | str,
    ) -> Iterator[Drawn]:
        ray, spec_there = self._ray, self._ray.put(spec)
        waiting, failures = deque(shards), Counter()
        running: dict[Any, tuple[Any, int]] = {}  # what a call returns → its actor, its shard
        try:
            while (waiting or running) and not stopped():
                self._hand_out(waiting, running, spec_there)
                done, _ = ray.wait(list(running), timeout=POLL)
                for call in done:
                    actor, shard = running.pop(call)
                    try:
                        drawn = ray.get(call)
                    except ray.exceptions.RayError as error:
                        failures[shard] += 1
                        self._survive(actor, shard, failures[shard], error)
                        waiting.appendleft(shard)
                    else:
                        self._hand_out(waiting, running, spec_there)
                        yield drawn
        finally:
            for actor in self.actors:
                ray.kill(actor)
            self.actors = []

    def _start(self) -> Any:
        return self._remote.remote(self._model, self._options)

    def _hand_out(self, waiting: deque[int], running: dict[Any, tuple[Any, int]], spec: Any) -> None:
        """Shards to those actors that have the fewest."""
        self.actors = self.actors or [self._start()]
        load = Counter(dict.fromkeys(self.actors, 0))
        load.update(actor for actor, _ in running.values())
        while waiting and (actor := min(self.actors, key=load.__getitem__)) and load[actor] < QUEUED:
            shard = waiting.popleft()
            running[actor.draw.remote(spec, shard)] = actor, shard
            load[actor] += 1

    def _survive(self, actor: Any, shard: int, attempts: int, error: Exception) -> None:
        """Put an actor that failed aside, and a new one in its place. EngineError after too many attempts."""
        why = _why(error)
        if attempts >= ATTEMPTS:
            raise EngineError(f"shard {shard} failed on {attempts} actors, at last with: {why}") from error
        warnings.warn(f"shard {shard} failed on an actor ({why}); another one draws it", stacklevel=2)
        if actor in self.actors:
            self.actors.remove(actor)
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)
            self.actors.append(self._start())


def _why(error: Exception) -> str:
    """One line out of Ray's many: what the actor raised, or that it died."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "creation task" in lines[0] else 0]


def ray_job(
    model: Callable,
    out: str | os.PathLike,
    n: int | None = None,
    *,
    address: str = "local",
    actors: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    executor: str = "auto",
    float8: Float8Config | None = None,
    sigmas=None,
    shape: tuple[int, int, int] | None = None,
    data_range: Range | None = None,
    ids=None,
    seed: int = 0,
    plan: Plan | None = None,
    format: str = "png",
    shard_size: int = SHARD_SIZE,
    weights: str | None = None,
    notes=None,
) -> Job:
    """A ``Job`` whose shards are drawn by Ray actors, each with ``Engine(model, batch, device, precision, …)``.

    address: "local", "auto" or ray://host:port. actors: None, one for each GPU of the cluster, or each CPU core.
    Everything else as in ``Job`` and ``Engine``. All actors must compute alike: one kind of GPU, one build.
    """
    options = {"batch": batch, "device": device, "precision": precision, "executor": executor, "float8": float8}
    identity = identity_of(model, weights)
    source = RaySource(model, address, actors, options | {"sigmas": sigmas, "shape": shape, "data_range": data_range})
    geometry, shape, data_range, plan = source.describe(plan)
    spec = make_spec(geometry, shape, data_range, identity, plan, seed, n, ids, format, shard_size)
    return Job.from_source(source, spec, out, with_scales(notes, float8))
