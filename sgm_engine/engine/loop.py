"""What runs between a request and its samples: slots filled, advanced, harvested and filled again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from sgm_engine.checks import MAX_ID, check_int
from sgm_engine.engine.lanes import Lanes
from sgm_engine.engine.progress import Stats, StepInfo, progress_bar
from sgm_engine.errors import CaptureFailed, out_of_memory
from sgm_engine.executors.network import Network
from sgm_engine.executors.protocol import Executor
from sgm_engine.executors.slots import NO_BAD_ROW, Job, Slots, Tables
from sgm_engine.keys import to_device
from sgm_engine.numerics import undisturbed
from sgm_engine.plans.plan import Plan

STRIDE = 16  # steps between two looks at the cancel flag


def backends(device: torch.device) -> str:
    """Which backend runs each op on a GPU."""
    if device.type != "cuda":
        return ""
    from sgm_engine.kernels.tables import backend as backend_table

    ops = {"update": "langevin_update", "norm": "norm"}
    return "; ".join(f"{name} by {backend_table.summary(op, device)}" for name, op in ops.items())


class Loop:
    """The loop of an engine, over the lane that its request was given. ``Engine`` adds checks, turns and results."""

    def __init__(
        self,
        network: Network,
        executor: Executor,
        auto: bool,
        batch: int,
        shape: tuple[int, int, int],
        buckets: Sequence[int],
    ):
        """auto: the eager executor may take this one's place."""
        device = network.device
        # Dense in the layout that the convolutions run fastest in: PyTorch's in float32 on a CPU are NCHW's.
        nhwc = device.type == "cuda" or (network.precision != "float32" and executor.name == "eager")
        slots = Slots(batch, shape, device, torch.channels_last if nhwc else torch.contiguous_format)
        self._network, self._auto, self._tables = network, auto, Tables(device)
        self._lanes = Lanes(buckets, network, self._tables, slots, executor)
        self._cancel = threading.Event()
        self._stats = Stats()

    @property
    def executor(self) -> str:
        """The executor that runs: "eager", "native", "hybrid" or "graph"."""
        return self._executor.name

    def describe(self) -> str:
        """The executor that runs, and what it makes of the model: algorithms, memory, why it is not a faster one."""
        about = getattr(self._executor, "describe", str)(), self._network.describe(), backends(self.device)
        return ": ".join([f"{self.executor}, {self._network.precision}, batch {self.batch}", *filter(None, about)])

    @property
    def batch(self) -> int:
        """The compute batch: as it was asked for, or halved when memory ran out."""
        return self._lanes.largest

    @property
    def buckets(self) -> tuple[int, ...]:
        """The smaller compute batches."""
        return tuple(self._lanes.sizes[:-1])

    @property
    def stats(self) -> Stats:
        return self._stats

    @property
    def _slots(self) -> Slots:
        return self._lanes.current.slots

    @property
    def _executor(self) -> Executor:
        return self._lanes.current.executor

    def _run(self, chains, plan, callback, progress, total, known=None) -> Iterator[tuple[list[Job], Tensor, Tensor]]:
        """The loop. chains: (sample id, seed, init) of each sample. Yields (jobs, x, bad_row within the plan) of every
        harvest; tensors stay on the device."""
        with undisturbed():
            rows = self._tables.add(plan)
        jobs = (
            Job(check_int("sample_ids", sample_id, 0, MAX_ID), seed, plan, rows, index, init)
            for index, (sample_id, seed, init) in enumerate(chains)
        )
        begin = partial(self._begin, plan, known)
        step = 0
        with progress_bar(total, plan.nfe, progress) as advance:
            begin(jobs)
            while (live := (slots := self._slots).live) and not self._cancel.is_set():
                before = slots.x.clone() if callback else None
                steps = self._fit(partial(self._advance, 1 if callback else STRIDE))
                if not steps:  # those that ran start anew, in fewer slots
                    jobs = chain(sorted((slots.jobs[i] for i in live), key=lambda job: job.index), jobs)
                    begin(jobs)
                    continue
                step += steps
                advance(steps * len(live))
                if callback:
                    callback(StepInfo(step, slots, live, before, self._executor.score))
                harvest = self._harvest()
                if harvest:
                    slots.refill(jobs)
                    self._next_look = 0  # what begins after a write is drawn by it from its first step on
                    yield harvest

    def _begin(self, plan: Plan, known: tuple | None, jobs: Iterator[Job]) -> None:
        """Have all buffers and weights, and the slots full."""

        @undisturbed()
        def prepare() -> bool:
            self._slots.prepare(plan)
            if known is not None:
                self._slots.inpaint(*known)
            self._sync()
            return True

        while not self._fit(prepare):
            pass
        self._slots.refill(jobs)

    def _fit(self, work: Callable[[], int]) -> int:
        """work(), or 0 if it ran out of memory: then the batch is half of what it was, and its slots are empty."""
        try:
            return work()
        except Exception as error:
            if self._slots.batch == 1 or not out_of_memory(error):
                raise
        # Here, and not in the handler: what the failed step held goes with its traceback.
        was = self._slots.batch
        self._lanes.halve()
        warnings.warn(f"out of memory at batch {was}; running with batch {self.batch} from now on", stacklevel=5)
        return 0

    def _advance(self, most: int) -> int:
        """Run up to ``most`` steps, no further than to the first slot that finishes; says how many."""
        slots, stats = self._slots, self._stats
        if self._changed():  # an optimizer step since: copies of the weights follow
            self._sync()
        steps = min(slots.steps_to_harvest(), most)
        self._executor.run(steps)
        slots.advance(steps)
        stats.steps += steps
        stats.nfe += steps * len(slots.live)
        return steps

    def _harvest(self) -> tuple[list[Job], Tensor, Tensor] | None:
        """Slots.harvest, bad_row counted from the first row of each job's plan."""
        harvest = self._slots.harvest()
        if harvest is None:
            return None
        jobs, x, bad_row = harvest
        self._stats.harvested += len(jobs)
        first = to_device([job.rows.start for job in jobs], self.device)
        return jobs, x, torch.where(bad_row == NO_BAD_ROW, bad_row, bad_row - first)

    def _changed(self) -> bool:
        """Whether a weight was written since the last sync: a glance at every call, a look at all of them where
        samples begin and every STRIDE steps."""
        watch = self._network.watch
        if watch.glance() != self._seen:
            return True
        if self._stats.steps < self._next_look:
            return False
        self._next_look = self._stats.steps + STRIDE
        return watch.look() != self._held

    def _sync(self, force: bool = False) -> None:
        """Give the executor fresh weights; a model that cannot be captured goes to the eager one for good if "auto"."""
        with undisturbed():
            if self._network.replaced():
                self._lanes.rebind()
            self._seen = self._network.watch.glance()
            self._next_look = self._stats.steps + STRIDE
            before = self._executor.captures
            try:
                self._executor.sync_weights(**{"force": True} if force else {})
            except CaptureFailed as error:
                if not self._auto:
                    raise
                warnings.warn(f"{error}; running eager from now on", stacklevel=5)
                self._lanes.go_eager()
                self._executor.sync_weights()
            else:
                self._stats.captures += self._executor.captures - before
            self._held = self._network.watch.states

    def _bind(self, executor: Executor) -> None:
        self._lanes.tables = self._tables
        self._lanes.replace(executor)
