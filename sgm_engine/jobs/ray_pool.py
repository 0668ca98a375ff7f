"""A job's shards drawn by Ray actors, each with an engine; this process writes them. Needs the extra [ray].

Actors need no shared file system: the model goes to them, samples come back. Nodes may come and go (ray_crew.py); since
shards depend on nothing but their ids, the bytes are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from sgm_engine.errors import EngineError
from sgm_engine.files.storage import is_url
from sgm_engine.jobs.bucket import ShardWriter
from sgm_engine.jobs.identity import identity_of
from sgm_engine.jobs.job import Job, make_spec, with_scales
from sgm_engine.jobs.ray_actor import EnginePainter
from sgm_engine.jobs.ray_crew import Crew
from sgm_engine.jobs.source import Drawn
from sgm_engine.jobs.spec import SHARD_SIZE, JobSpec
from sgm_engine.outputs.images import Range
from sgm_engine.outputs.sample_ids import SampleIds
from sgm_engine.plans.plan import Plan
from sgm_engine.rewriting.float8.config import Float8Config

PATIENCE = 3600.0  # seconds


class RaySource:
    """A crew of actors; shards come in the order in which they get finished."""

    def __init__(
        self,
        make: Callable[[], Any],
        address: str,
        actors: int | None,
        device: str,
        patience: float = PATIENCE,
        out: str | os.PathLike = "",
    ):
        """make: a painter (ray_actor.py), called in each actor. address: "local" starts Ray here; "auto" or
        ray://host:port joins a cluster. out: where the job goes: actors put shards on object storage themselves."""
        try:
            import ray
        except ImportError:
            raise ValueError("--ray needs Ray: pip install 'sgm-engine[ray]'") from None
        if not (isinstance(patience, (int, float)) and patience > 0):
            raise ValueError(f"patience must be seconds > 0, got {patience!r}")
        self._ray, self._url = ray, out if is_url(out) else None
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if not ray.is_initialized():
            try:
                ray.init(address=address, **quiet, **({"include_dashboard": False} if address == "local" else {}))
            except (ValueError, RuntimeError, OSError) as error:
                raise ValueError(f"--ray {address}: no cluster can be joined there: {error}") from None
        gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        if device == "cuda" and not gpu:
            raise ValueError("device='cuda': there is no GPU in this Ray cluster")
        env = {k: v for k, v in os.environ.items() if k.startswith("SGM_")}
        self.crew = Crew(ray, ray.cloudpickle.dumps(make), "GPU" if gpu else "CPU", actors, env, patience)

    def describe(self) -> Any:
        """What the first actor says of itself. ValueError: none can be made, or none came in time."""
        try:
            return self.crew.describe()
        except EngineError as error:
            self.crew.close()
            raise ValueError(f"an actor could not be made: {error}") from None
        except BaseException:
            self.crew.close()
            raise

    def cancel(self) -> None:
        """``draw`` looks by itself, a few times a second."""

    def draw(
        self,
        spec: JobSpec,
        shards: Iterable[int],
        settle: Callable[[], None],
        stopped: Callable[[], bool],
        bar: bool | str,
    ) -> Iterator[Drawn]:
        job = self._ray.cloudpickle.dumps(replace(spec, ids=SampleIds([]), earlier=()))
        write = self._url and self._ray.put(self._ray.cloudpickle.dumps(ShardWriter(self._url, spec)))
        args_of = lambda shard: (str(spec.shard_ids(shard)), shard, write)  # noqa: E731
        with closing(self.crew.draw(job, list(shards), args_of, stopped)) as drawing:
            for shard, drawn in drawing:
                yield Drawn(shard, *drawn)


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
    patience: float = PATIENCE,
) -> Job:
    """A ``Job`` whose shards are drawn by Ray actors, each with ``Engine(model, batch, device, precision, …)``.

    address: "local", "auto" or ray://host:port. actors: None, one for each GPU of the cluster, or each CPU core, as
        nodes come and go. patience: seconds without a shard after which it ends, saying what it waited for.
    Everything else as in ``Job`` and ``Engine``. All actors must compute alike: one kind of GPU, one build.
    """
    options = {"batch": batch, "device": device, "precision": precision, "executor": executor, "float8": float8}
    options |= {"sigmas": sigmas, "shape": shape, "data_range": data_range}
    identity = identity_of(model, weights)
    source = RaySource(partial(EnginePainter, model, options, plan), address, actors, device, patience, out)
    geometry, shape, data_range, plan = source.describe()
    try:
        spec = make_spec(geometry, shape, data_range, identity, plan, seed, n, ids, format, shard_size)
        return Job.from_source(source, spec, out, with_scales(notes, float8))
    except BaseException:
        source.crew.close()  # or an actor would live as long as somebody keeps the error
        raise
