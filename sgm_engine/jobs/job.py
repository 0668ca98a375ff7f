"""Jobs: many samples to a folder, shard by shard; a job can be stopped, killed and run again until it is complete."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from sgm_engine.checks import MAX_SEED, check_int
from sgm_engine.engine.engine import Engine
from sgm_engine.errors import Divergence
from sgm_engine.jobs.bucket import open_folder
from sgm_engine.jobs.card import model_card
from sgm_engine.jobs.folder import ShardError
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.identity import ModelIdentity, identity_of
from sgm_engine.jobs.record import Record
from sgm_engine.jobs.source import Drawn, EngineSource, Source
from sgm_engine.jobs.spec import SHARD_SIZE, Geometry, JobSpec
from sgm_engine.jobs.worker import Worker
from sgm_engine.jobs.writer import Writer
from sgm_engine.outputs.images import check_channels
from sgm_engine.outputs.sample_ids import SampleIds
from sgm_engine.pace import clock
from sgm_engine.plans.plan import Plan
from sgm_engine.rewriting.float8.config import Float8Config


@dataclass(frozen=True)
class Progress:
    """After a shard is on the disk: this worker's samples and shards so far and in all, earlier runs included."""

    samples: int
    samples_in_all: int
    shards: int
    shards_in_all: int
    rate: float  # samples/s of this run
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"{self.samples} of {self.samples_in_all} samples, {self.shards} of {self.shards_in_all} shards, "
            f"{self.rate:.3g} samples/s, {clock(self.seconds_left)} left"
        )


@dataclass
class Report:
    """What one ``Job.run`` did. complete: every shard of the job is on the disk, those of other workers included."""

    worker: Worker
    shards: int = 0  # drawn and written by this run
    samples: int = 0
    seconds: float = 0.0
    found: int = 0  # shards of this worker's share that were there already, and good
    redrawn: list[ShardError] = field(default_factory=list)  # recorded shards that were damaged, and drawn again
    diverged: list[Divergence] = field(default_factory=list)  # of the share, earlier runs included; never written
    stopped: bool = False
    stolen: set[int] = field(default_factory=set)  # shards of other workers' shares, drawn by this run
    lost: list[int] = field(default_factory=list)  # shards of the share that are not there at the end: stopped, removed
    complete: bool = False


class Job:
    """Samples of one seed and plan, in shards in a folder. Equal arguments resume, further ids (a larger n) extend a
    job; other arguments are refused.

    engine: draws the samples; its precision, executor and batch are part of the job, as are the weights.
    out: the folder, or s3://…, gs://…, az://… (the extra [storage]).
    n: sample ids 0 to n − 1; or ids: SampleIds, their text ("0-63,100") or an iterable of integers.
    format: "png", "npz" and "webdataset" (8 bits, of engine.data_range), or "safetensors" (float32, as drawn).
    shard_size: sample ids in a shard. Shards do not depend on who draws them.
    weights: what tells this model from others. None: the sha256 of its parameters and buffers, and every other value
        that decides its samples (settings.py); ValueError if one cannot be told from another.
    notes: kept in run.json, no part of what the job is; the scales of precision "float8" are added.

    ValueError and TypeError name the argument; JobError (a ValueError) if the folder holds something else.
    """

    def __init__(
        self,
        engine: Engine,
        out: str | os.PathLike,
        n: int | None = None,
        *,
        ids: SampleIds | str | Iterable[int] | None = None,
        seed: int = 0,
        plan: Plan | None = None,
        format: str = "png",
        shard_size: int = SHARD_SIZE,
        weights: str | None = None,
        notes: Mapping[str, Any] | None = None,
    ):
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, got {type(engine).__name__}: Engine(model, batch=…)")
        plan, source = engine._check(plan, None), EngineSource(engine, weights)
        model = identity_of(engine.model, weights)
        drawn = Geometry.of(engine), engine.shape, engine.data_range
        self.spec = make_spec(*drawn, model, plan, seed, n, ids, format, shard_size)
        self._prepare(source, out, with_scales(notes, engine.float8))

    @classmethod
    def from_source(
        cls, source: Source, spec: JobSpec, out: str | os.PathLike, notes: Mapping[str, Any] | None = None
    ) -> Job:
        """A job whose shards come from elsewhere than an engine in this process."""
        job = cls.__new__(cls)
        job.spec = spec
        job._prepare(source, out, notes)
        return job

    def _prepare(self, source: Source, out: str | os.PathLike, notes: Mapping[str, Any] | None) -> None:
        self.source, self.folder, self.notes = source, open_folder(out), dict(notes or {})
        self._stop = threading.Event()
        self.spec = self.folder.check(self.spec)

    def run(
        self,
        worker: Worker | None = None,
        progress: bool | str = False,
        on_shard: Callable[[Progress], object] | None = None,
        steal: bool = False,
    ) -> Report:
        """Draw and write what is missing of this worker's share.

        worker: its share; None: from the variables of torchrun, Slurm or Kubernetes, else everything. progress: as of
        Engine.sample. on_shard: called, from the writing thread, with a Progress after each shard. steal: go on with
        what other workers have not written, until the job is complete.

        Shards that are there are read and compared with their records; damaged ones are drawn again. Samples that
        become non-finite are recorded and left out. Raises JobBusy if another process writes this share, OSError if a
        shard cannot be written: what is complete stays, and the next run goes on there.
        """
        worker = Worker.from_environment() if worker is None else worker
        report = Report(worker)
        try:
            self._run(report, progress, on_shard, steal)
        finally:
            report.stopped = self._stop.is_set()
            self._stop.clear()
        wanted = range(self.spec.shards) if steal else worker.share(self.spec.shards)
        report.lost = self.folder.lost(self.spec, wanted)
        report.complete = not report.lost and len(self.folder.recorded(self.spec)) >= self.spec.shards
        return report

    def stop(self) -> None:
        """End the running ``run`` (or else the next) within a few steps, from any thread or a signal handler.

        What is complete is written first.
        """
        self._stop.set()
        self.source.cancel()

    def diverged(self) -> list[Divergence]:
        """The quarantined samples of a complete job, whoever drew them."""
        return [d for shard in range(self.spec.shards) for d in self.folder.record(self.spec, shard).diverged]

    def _run(self, report: Report, progress: bool | str, on_shard: Callable | None, steal: bool) -> None:
        worker = report.worker
        if self.folder.read_only():  # where nothing can be locked there may be nothing to do
            there = Report(worker)
            if not self._missing(there):
                report.found, report.diverged = there.found, there.diverged
                return
        with self.folder.writing(self.spec, worker, self.notes, model_card(self.spec, self.notes)):
            missing = self._missing(report)
            start = time.perf_counter()
            write = partial(self._write, report, on_shard, start)
            with Writer(write, on_error=self.stop) as writer:
                shards = self._not_taken(report, missing) if steal else missing
                drawing = self.source.draw(self.spec, shards, writer.settle, self._stop.is_set, progress)
                with closing(drawing):
                    for drawn in drawing:
                        writer.put(drawn)
            report.seconds = time.perf_counter() - start

    def _missing(self, report: Report) -> list[int]:
        """The shards of the share to draw; counts and collects what is there."""
        missing, recorded = [], self.folder.recorded(self.spec)
        for shard in report.worker.share(self.spec.shards):
            if self._stop.is_set():
                break
            if shard not in recorded:
                missing.append(shard)
                continue
            try:
                record, _ = self.folder.read(self.spec, shard)
                report.found += 1
                report.diverged += record.diverged
            except ShardError as error:
                missing.append(shard)
                if error.kind != "outgrown":
                    report.redrawn.append(error)
        return missing

    def _not_taken(self, report: Report, missing: list[int]) -> Iterator[int]:
        """``missing`` less what others have drawn meanwhile, then what is missing of their shares, in random order: two
        that draw the same shard lose time, and nothing else."""
        damaged, share = {error.shard for error in report.redrawn}, report.worker.share(self.spec.shards)
        for shard in missing:
            if shard in damaged or (record := self._record(shard)) is None:
                yield shard
            else:
                report.found += 1
                report.diverged += record.diverged
        left = sorted(set(range(self.spec.shards)) - self.folder.recorded(self.spec) - set(share))
        for shard in Random(report.worker.index).sample(left, len(left)):
            if self._record(shard) is None:
                report.stolen.add(shard)
                yield shard

    def _record(self, shard: int) -> Record | None:
        try:
            return self.folder.record(self.spec, shard)
        except ShardError:
            return None

    def _write(self, report: Report, on_shard: Callable | None, start: float, drawn: Drawn) -> None:
        shard, ids, samples, diverged = drawn
        if samples is not None:
            files = FORMATS[self.spec.format].encode(shard, ids, samples, self.spec.data_range)
            self.folder.publish(self.spec, shard, files, diverged)
        report.shards += 1
        report.samples += len(ids)
        report.diverged += diverged
        if on_shard:
            on_shard(self._progress(report, time.perf_counter() - start))

    def _progress(self, report: Report, seconds: float) -> Progress:
        """Counts by whole shards; only the last shard of a job may be shorter."""
        share, size, last = report.worker.share(self.spec.shards), self.spec.shard_size, self.spec.shards - 1
        short = size * self.spec.shards - len(self.spec.ids) if last in share or last in report.stolen else 0
        shards, done = len(share) + len(report.stolen), report.found + report.shards
        in_all = shards * size - short
        samples = in_all if done == shards else done * size
        rate = report.samples / seconds if seconds > 0 else 0.0
        left = (in_all - samples) / rate if rate else 0.0
        return Progress(samples, in_all, done, shards, rate, left)


def generate(
    engine: Engine,
    out: str | os.PathLike,
    n: int | None = None,
    *,
    worker: Worker | None = None,
    progress: bool | str = False,
    on_shard: Callable[[Progress], object] | None = None,
    **job: Any,
) -> Report:
    """``Job(engine, out, n, **job).run(…)``: start a job, or go on with it; call it again until ``.complete``."""
    return Job(engine, out, n, **job).run(worker, progress, on_shard)


def with_scales(notes: Mapping[str, Any] | None, float8: Float8Config | None) -> dict[str, Any]:
    """The notes of a job, and what ``sgm resample`` and the next ``sgm sample`` need of float8."""
    return dict(notes or {}) | ({} if float8 is None else {"float8": float8.to_json()})


def make_spec(geometry, shape, data_range, model: ModelIdentity, plan, seed, n, ids, format, shard_size) -> JobSpec:
    """The spec from a job's arguments, checked."""
    if (n is None) == (ids is None):
        raise ValueError(f"pass n (sample ids 0 to n − 1) or ids, one of them; got n={n!r} and ids={ids!r}")
    if ids is None:
        ids = range(check_int("n", n, 0))
    try:
        ids = SampleIds.parse(ids) if isinstance(ids, str) else SampleIds.of(ids)
    except ValueError as error:
        raise ValueError(f"ids: {error}") from None
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format in ("png", "webdataset"):
        check_channels(shape[0])
    if not isinstance(model.weights, str) or not model.weights:
        raise TypeError(f"weights must be a text that names the model's weights, got {model.weights!r}")
    seed, shard_size = check_int("seed", seed, 0, MAX_SEED), check_int("shard_size", shard_size, 1)
    told = {"model": model.settings, "data_range": data_range}
    return JobSpec(model.weights, plan, seed, ids, tuple(shape), format, shard_size, geometry, **told)
