"""Where shards come from: an engine, or anything else that draws them (ray_pool.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import NamedTuple, Protocol

import numpy as np

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import Cancelled, Divergence, EngineError
from sgm_engine.jobs.identity import settings, weights_digest
from sgm_engine.jobs.spec import Geometry, JobError, JobSpec, changed


class Drawn(NamedTuple):
    """A shard in memory. ids int64 [n], samples float32 [n, C, H, W]: the good ones; diverged: the others.

    samples None: the shard is written where it was drawn."""

    shard: int
    ids: np.ndarray
    samples: np.ndarray | None
    diverged: list[Divergence]


class Source(Protocol):
    def draw(
        self,
        spec: JobSpec,
        shards: Iterable[int],
        settle: Callable[[], None],
        stopped: Callable[[], bool],
        bar: bool | str,
    ) -> Iterator[Drawn]:
        """The shards in any order; ends early once ``stopped()``. settle: waits until what was yielded is on disk.
        Where ``shards`` is no list, the next one is asked for as late as can be."""

    def cancel(self) -> None:
        """Make a running ``draw`` end soon; from any thread or a signal handler."""


class EngineSource:
    """One stream of samples over all shards, so that the batch is full from the first shard to the last."""

    def __init__(self, engine: Engine, weights: str | None = None):
        """weights: what the job's user calls them; None: their digest, taken now."""
        self.engine, self._named = engine, weights is not None
        self._contents = engine._network.contents()

    def cancel(self) -> None:
        self.engine.cancel()

    def draw(
        self,
        spec: JobSpec,
        shards: Iterable[int],
        settle: Callable[[], None],
        stopped: Callable[[], bool],
        bar: bool | str,
    ) -> Iterator[Drawn]:
        open_shards: deque[_Open] = deque()
        finished: deque[Drawn] = deque()
        contents = self.engine._network.contents()
        if not self._named and contents != self._contents and weights_digest(self.engine.model) != spec.weights:
            raise JobError("the model's weights are not those that the job was made with: make another job")
        if not self._named and (changes := changed(spec.model, settings(self.engine.model))):
            raise JobError(f"the model is not what the job was made with: {changes}; make another job")

        renewals = []

        def feed() -> Iterator[int]:
            renewals.append(self.engine._network.renewals)  # the engine has just looked at the model
            for shard in shards:
                ids = spec.shard_ids(shard)
                open_shards.append(_Open(shard, ids, spec.shape))
                for place, sample_id in enumerate(ids):
                    if place == len(ids) - 1:
                        settle()  # before this shard can be complete: a kill costs one finished shard at the most
                    if stopped():
                        return
                    yield sample_id

        def add(sample_id: int, found) -> None:
            if open_shards[0].add(sample_id, found):
                finished.append(open_shards.popleft().drawn())

        ids = feed()
        if isinstance(shards, list):
            ids = _Sized(ids, sum(len(spec.shard_ids(shard)) for shard in shards))
        stream = self.engine.stream(ids, spec.seed, spec.plan, progress=bar, on_diverged=lambda d: add(d.sample_id, d))
        with closing(stream), suppress(Cancelled):
            for sample_id, x in stream:
                add(sample_id, x)
                if finished:
                    self._check(spec, contents, renewals[0])
                while finished:
                    settle()  # a shard shorter than the batch can be complete as soon as the one before it
                    yield finished.popleft()
        if finished:
            self._check(spec, contents, renewals[0])
        for drawn in finished:  # shards whose last sample diverged
            settle()
            yield drawn

    def _check(self, spec: JobSpec, contents: list[tuple], renewals: int) -> None:
        """EngineError if samples may have been drawn by another model, or in another way, than the job says."""
        network = self.engine._network
        if network.contents() != contents:
            raise EngineError("the model's weights changed while a job drew from it: give the job a copy of the model")
        if (what := network.observed.changed()) is not None or network.renewals != renewals:
            named = "" if self._named else changed(spec.model, settings(self.engine.model))
            said = f": {named or what}" if named or what else ""
            raise EngineError(f"the model changed while a job drew from it{said}: give the job a copy of the model")
        if changes := changed(vars(spec.geometry), vars(Geometry.of(self.engine))):
            raise EngineError(f"these samples are not computed as the job's are: {changes}. Start it with what is now")


class _Open:
    """A shard that is being drawn; samples arrive in the order of its ids."""

    def __init__(self, shard: int, ids: Iterable[int], shape: tuple[int, int, int]):
        self.shard, self.left = shard, len(ids)
        self.ids, self.samples = [], np.empty((self.left, *shape), np.float32)
        self.diverged: list[Divergence] = []

    def add(self, sample_id: int, found) -> bool:
        """found: a tensor or a Divergence. True: the shard is complete."""
        if isinstance(found, Divergence):
            self.diverged.append(found)
        else:
            self.samples[len(self.ids)] = found.cpu()
            self.ids.append(sample_id)
        self.left -= 1
        return not self.left

    def drawn(self) -> Drawn:
        n = len(self.ids)
        return Drawn(self.shard, np.array(self.ids, np.int64), self.samples[:n], self.diverged)


class _Sized:
    """An iterator that says how many there will be, for the engine's bar."""

    def __init__(self, items: Iterator[int], total: int):
        self._items, self._total = items, total

    def __iter__(self) -> Iterator[int]:
        return self._items

    def __len__(self) -> int:
        return self._total
