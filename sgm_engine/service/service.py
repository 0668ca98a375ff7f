"""A sampler inside another program: requests from any thread share one running batch, and each gets its own samples.

Continuous batching over the engine's slots. A slot that falls free goes to the next sample in a fair order, whatever
its plan: rows of all plans lie in the same tables. A sample is a function of (seed, sample id, plan) at a fixed compute
batch, so a request's samples are those of ``Engine.sample`` with the same arguments, bit for bit, whoever it ran with.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from time import monotonic

import torch
from torch import Tensor

from sgm_engine.checks import check_chains, check_int
from sgm_engine.engine.engine import Engine
from sgm_engine.engine.loop import STRIDE
from sgm_engine.engine.results import Results
from sgm_engine.errors import DeadlineExceeded
from sgm_engine.executors.slots import Job
from sgm_engine.plans.plan import Plan
from sgm_engine.service.awaited import awaited
from sgm_engine.service.callbacks import Callbacks, ClientFuture, check_process
from sgm_engine.service.queue import Deadlines, Door, FairQueue, Meter, Metrics, Request, check_seconds, note_cancelled

ROWS = 65536  # of plans that can share a batch without waiting for one another
LINGER = 1.0  # seconds without work after which the worker thread ends


class SamplerService:
    """``with SamplerService(Engine(model)) as service: x = service.submit(8, seed=1).result()`` → [8, C, H, W].

    engine: runs it all, on one thread that exists while there is work; a call of the engine itself waits for a moment
        without work. capacity: the most samples accepted and not yet finished, which bounds memory (their results lie
        on the engine's device); None: 64 for each slot.

    Leaving the block finishes what was accepted, an exception in it cancels that; then no thread is left.
    """

    def __init__(self, engine: Engine, capacity: int | None = None):
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, got {type(engine).__name__}: SamplerService(Engine(model))")
        if engine.buckets:
            raise ValueError(
                f"engine must have no buckets, got {engine.buckets}: a service computes at engine.batch always, and "
                "would give other bits than engine.sample"
            )
        self.engine = engine
        self.capacity = check_int("capacity", 64 * engine.batch if capacity is None else capacity, 1)
        self._lock = threading.Condition()  # guards everything below
        self._queue, self._meter = FairQueue(), Meter()
        self._door, self._deadlines = Door(self.capacity, self._lock), Deadlines()
        self._requests: set[Request] = set()  # accepted and not over
        self._cancelled: deque[Request] = deque()
        self._worker: threading.Thread | None = None
        self._callbacks, self._process = Callbacks(), os.getpid()

    def submit(
        self,
        n: int,
        seed: int | Sequence[int] = 0,
        plan: Plan | None = None,
        first_id: int = 0,
        init: Tensor | None = None,
        deadline: float | None = None,
        wait: float | None = None,
    ) -> Future[Tensor]:
        """The future of ``engine.sample(n, seed, plan, first_id, init=init)``: the same bits, or SampleDiverged.

        deadline: seconds from now by which it must be finished; else the future raises DeadlineExceeded, which carries
            what is. wait: seconds to wait for room while ``capacity`` samples are pending, None as long as it takes;
            then QueueFull. ``future.cancel()`` works until the last sample is there and frees the slots at once.
        """
        called = monotonic()
        check_process(self._process)
        engine = self.engine
        if check_int("n", n, 0) > self.capacity:
            raise ValueError(f"n must be at most capacity = {self.capacity}, got {n}: raise it, or submit n in parts")
        plan, chains = engine._check(plan, None), check_chains(n, seed, first_id, init, engine.shape, engine.device)
        check_seconds("deadline", deadline)
        check_seconds("wait", wait)
        late = None if deadline is None else called + deadline
        request = Request(chains, plan, called, late, ClientFuture(self._callbacks))
        if n == 0:
            request.future.set_result(torch.empty(0, *self.engine.shape, device=self.engine.device))
            return request.future
        with self._lock:
            if threading.current_thread() is self._worker:  # in a future's callback: it would wait for itself
                wait = 0
            limits = [seconds for seconds in (wait, deadline) if seconds is not None]
            self._door.enter(n, min(limits, default=None))
            if self._worker is None:
                worker = threading.Thread(target=self._work, name="SamplerService")
                try:
                    worker.start()
                except BaseException:  # no more threads here: nothing has been accepted
                    self._door.leave(n)
                    raise
                self._worker = worker
            self._requests.add(request)
            self._queue.push(request)
            self._deadlines.add(request)
            self._lock.notify_all()
        note_cancelled(self._cancelled, request)
        return request.future

    async def draw(
        self,
        n: int,
        seed: int | Sequence[int] = 0,
        plan: Plan | None = None,
        first_id: int = 0,
        init: Tensor | None = None,
        deadline: float | None = None,
        wait: float | None = None,
    ) -> Tensor:
        """``submit`` for asyncio: the samples, and its errors. A task that is cancelled cancels its request."""
        return await awaited(partial(self.submit, n, seed, plan, first_id, init, deadline), wait)

    def metrics(self) -> Metrics:
        """What is pending and running, how full the slots were, and how long requests waited."""
        check_process(self._process)
        with self._lock:
            meter, batch = self._meter, self.engine.batch
            return Metrics(
                self._door.pending,
                self.capacity,
                len(self.engine._slots.live) if self._requests else 0,
                batch,
                meter.evaluations / max(meter.steps * batch, 1),
                meter.finished,
                meter.finished / meter.busy if meter.busy else 0.0,
                dict(meter.requests),
                *meter.percentiles(),
            )

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Take no more requests. cancel: cancel those that were accepted. wait: return when no thread is left."""
        if os.getpid() != self._process:  # a fork that leaves the block
            return
        with self._lock:
            self._door.closed = True
            outstanding, worker = list(self._requests), self._worker
            self._lock.notify_all()
        if cancel:
            for request in outstanding:
                request.future.cancel()
        if wait and worker is not threading.current_thread():
            if worker is not None:
                worker.join()
            self._callbacks.join()

    def __enter__(self) -> SamplerService:
        return self

    def __exit__(self, error, *_) -> None:
        self.shutdown(cancel=error is not None)

    # The worker's thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._callbacks.service = threading.current_thread()
        try:
            while self._has_work():
                with self.engine._request():
                    self._serve()
        except BaseException as error:
            with self._lock:
                self._worker, self._door.closed = None, True
            self._fail(self._outstanding(), error)
            raise

    def _has_work(self) -> bool:
        """Wait for work; False, and this thread is no longer the worker, after LINGER or at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._requests or self._door.closed, LINGER)
            if not self._requests:
                self._worker = None
            return bool(self._requests)

    def _serve(self) -> None:
        """Run the engine until no request is left. An error of the model fails the requests that were in its batch."""
        engine, slots = self.engine, self.engine._slots
        engine._tables.reserve(ROWS)
        try:
            engine._sync()
        except Exception as error:
            return self._fail(self._outstanding(), error)
        while self._requests:
            began = monotonic()
            self._sweep()
            started: list[Request] = []
            try:
                slots.refill(self._jobs(started))
                if not slots.live:
                    continue
                live = len(slots.live)
                steps = engine._advance(STRIDE if live == slots.batch else 1)  # a free slot: newcomers join soon
                harvest = engine._harvest()
            except Exception as error:
                affected = {job.owner for job in slots.jobs if job is not None} | set(started)
                slots.clear()
                self._fail(affected, error)
                continue
            with self._lock:
                self._meter.steps += steps
                self._meter.evaluations += steps * live
                self._meter.busy += monotonic() - began
            if harvest:
                self._deliver(*harvest)
        return None

    def _jobs(self, started: list[Request]) -> Iterator[Job]:
        """The samples to start, in the queue's order. Their requests are noted in ``started``."""
        engine = self.engine
        idle = not engine._slots.live
        while True:
            with self._lock:
                request = self._queue.peek()
                if request is None or not (idle or engine._tables.has_room(request.plan)):
                    return  # nothing to start, or not before every slot is idle: then older plans can go
                request, index = self._queue.pop()
                started.append(request)
                request.started = request.started or monotonic()
            idle, new = False, request.plan not in engine._tables
            rows = engine._tables.add(request.plan)
            if new:
                engine._slots.prepare(request.plan)
                engine._sync()  # buffers may be others now
            sample_id, seed, init = request.chains[index]
            yield Job(sample_id, seed, request.plan, rows, index, init, request)

    def _deliver(self, jobs: list[Job], x: Tensor, bad_row: Tensor) -> None:
        """Put a harvest where it belongs, and finish the requests that have all their samples."""
        where: dict[Request, list[int]] = {}
        for i, job in enumerate(jobs):
            where.setdefault(job.owner, []).append(i)
        for request, rows in where.items():
            some = slice(None) if len(rows) == len(jobs) else rows
            try:
                results = self._results(request)
                results.put([jobs[i].index for i in rows], x[some], bad_row[some])
                with self._lock:
                    self._meter.finished += len(rows)
                if len(results.finished) == request.n:
                    self._end(request, "finished", results.all())
            except Exception as error:  # SampleDiverged, or no memory for the results
                self._end(request, "failed", error=error)

    def _sweep(self) -> None:
        """End the requests that were cancelled or are late, and free their slots."""
        while self._cancelled:
            self._end(self._cancelled.popleft(), "cancelled")
        with self._lock:
            late = self._deadlines.passed()
        for request in late:
            diverged, ids, samples = self._results(request).good()
            message = f"not finished by its deadline: {len(ids)} of {request.n} samples are (.sample_ids, .samples)"
            self._end(request, "late", error=DeadlineExceeded(message, diverged, ids, samples))

    def _outstanding(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def _fail(self, requests: Iterable[Request], error: BaseException) -> None:
        for request in requests:
            self._end(request, "failed", error=error)

    def _end(self, request: Request, outcome: str, x: Tensor | None = None, error: BaseException | None = None) -> None:
        """Out of the queue and the slots, room for others, then the future."""
        if request.over:
            return
        slots = self.engine._slots
        if held := [i for i, job in enumerate(slots.jobs) if job is not None and job.owner is request]:
            slots.drop(held)
        request.over, request.results, request.chains = True, None, ()
        told = request.future.set_running_or_notify_cancel()
        with self._lock:
            self._requests.discard(request)
            self._door.leave(request.n)
            self._meter.end(request, outcome if told else "cancelled")
        if told and error is not None:
            request.future.set_exception(error)
        elif told:
            request.future.set_result(x)
        self._callbacks.start()

    def _results(self, request: Request) -> Results:
        if request.results is None:
            ids = [sample_id for sample_id, _, _ in request.chains]
            request.results = Results(ids, request.plan, self.engine.shape, self.engine.device)
        return request.results
