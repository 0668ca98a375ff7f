"""Slots: what changes from step to step, in device memory, and the host's mirror of it.

A batch is B slots; each holds one sample at its own row. Every live slot advances by one row a step, so the host knows
every row without asking the device. A slot whose row has reached its stop is idle: the update leaves it untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from sgm_engine.executors.known import Known
from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM
from sgm_engine.kernels.ops import NO_BAD_ROW
from sgm_engine.keys import as_int64, to_device
from sgm_engine.plans.plan import Plan

SAMPLE_STREAM = STREAM["sample"]  # of a chain's start (draw 0) and of its steps (draw k)


class Tables:
    """Plans as device tensors, one after the other; every row of every plan has its own index.

    coef: float32 [R, 4] (a, b, c, d) · keep: float32 [R, 2] (e, f) · adaptive: bool [R] · level: int64 [R]
    draw: int32 [R], 1, 2, … within each plan
    known_sigma: float32 [R], known_draw: int32 [2, R]: the noise of known pixels after the row, so the next row's:
        its σ, 0 after a plan's last; and by ``REDRAWS`` the draw of the first row at that σ, or the next row's own
    R is a capacity plus one row, so that the row of a slot that has finished at the very end can still be looked up.
    """

    def __init__(self, device: torch.device, capacity: int = 2048):
        self.device = device
        self._allocate(capacity)

    def __contains__(self, plan: Plan) -> bool:
        return plan.digest in self._rows

    def has_room(self, plan: Plan) -> bool:
        """Whether ``plan`` can be added while slots are live: it is there, or other plans need not go."""
        return plan in self or self._used + plan.nfe <= self.capacity

    def add(self, plan: Plan) -> range:
        """The rows of ``plan``, written unless they are there. Without room for it, call this only while every slot is
        idle: old plans go."""
        rows = self._rows.get(plan.digest)
        if rows is not None:
            return rows
        if self._used + plan.nfe > self.capacity:
            if plan.nfe > self.capacity:
                self._allocate(1 << (plan.nfe - 1).bit_length())
            self._rows, self._used = {}, 0
        rows = range(self._used, self._used + plan.nfe)
        table = torch.stack([torch.from_numpy(getattr(plan, name).copy()) for name in "abcdef"], 1).to(torch.float32)
        self.coef[rows.start : rows.stop], self.keep[rows.start : rows.stop] = table[:, :4], table[:, 4:]
        self.adaptive[rows.start : rows.stop] = torch.from_numpy(plan.adaptive == 1)
        self.draw[rows.start : rows.stop] = torch.from_numpy(np.arange(1, plan.nfe + 1, dtype=np.int32))
        draws = np.arange(1, plan.nfe + 1)
        level_draws = np.maximum.accumulate(np.where(np.diff(plan.sigma, prepend=0) != 0, draws, 0))
        after = np.append(np.stack([level_draws, draws])[:, 1:], [[0], [0]], 1)
        self.known_draw[:, rows.start : rows.stop] = torch.from_numpy(after.astype(np.int32))
        self.known_sigma[rows.start : rows.stop] = torch.from_numpy(np.append(plan.sigma[1:], 0).astype(np.float32))
        self.level[rows.start : rows.stop] = torch.from_numpy(plan.level.copy())
        self._rows[plan.digest], self._used = rows, rows.stop
        return rows

    def tensors(self) -> list[Tensor]:
        """What a step reads."""
        return [self.coef, self.keep, self.adaptive, self.draw, self.level]

    def reserve(self, capacity: int) -> None:
        """Have room for that many rows. Call it while every slot is idle."""
        if capacity > self.capacity:
            self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self.capacity, self._used = capacity, 0
        self._rows: dict[str, range] = {}
        self.coef = torch.zeros(capacity + 1, 4, dtype=torch.float32, device=self.device)
        self.keep = torch.zeros(capacity + 1, 2, dtype=torch.float32, device=self.device)
        self.adaptive = torch.zeros(capacity + 1, dtype=torch.bool, device=self.device)
        self.draw = torch.zeros(capacity + 1, dtype=torch.int32, device=self.device)
        self.known_sigma = torch.zeros(capacity + 1, dtype=torch.float32, device=self.device)
        self.known_draw = torch.zeros(2, capacity + 1, dtype=torch.int32, device=self.device)
        self.level = torch.zeros(capacity + 1, dtype=torch.int64, device=self.device)


@dataclass(frozen=True, eq=False)
class Job:
    """One sample to draw. rows: its plan's rows in the Tables. seed: uint64. index: its number in the request.

    init: float32 [C, H, W] to start from instead of the plan's start law. owner: whatever asked for it.
    """

    sample_id: int
    seed: int
    plan: Plan
    rows: range
    index: int = 0
    init: Tensor | None = None
    owner: object = None


class Slots:
    """B slots on one device.

    x: float32 [B, C, H, W], dense in ``memory_format`` · row, stop, seed, sample_id, bad_row: int64 [B].
    bad_row is the first row whose result was not finite, else NO_BAD_ROW. seed carries a uint64's bits.
    previous: like x, and gain: float32 [B], once a plan needs them (``prepare``), else None.
    """

    def __init__(
        self,
        batch: int,
        shape: tuple[int, int, int],
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.batch, self.shape, self.device, self.memory_format = batch, shape, device, memory_format
        self.x = torch.zeros(batch, *shape, dtype=torch.float32, device=device).to(memory_format=memory_format)
        self.counters = torch.zeros(5, batch, dtype=torch.int64, device=device)
        self.row, self.stop, self.seed, self.sample_id, self.bad_row = self.counters.unbind(0)
        self.previous: Tensor | None = None
        self.gain: Tensor | None = None
        self.known: Known | None = None  # while a request inpaints
        self._known: Known | None = None  # the same, kept from request to request
        self.jobs: list[Job | None] = [None] * batch
        self.done = [0] * batch  # rows that the slot's job has behind it

    def of(self, batch: int) -> Slots:
        """Empty slots like these, ``batch`` of them."""
        return Slots(batch, self.shape, self.device, self.memory_format)

    @property
    def live(self) -> list[int]:
        """The slots that hold an unfinished sample."""
        return [i for i, job in enumerate(self.jobs) if job is not None]

    def prepare(self, plan: Plan) -> None:
        """Have the buffers that ``plan`` needs; the first plan that does makes them, for good."""
        if self.previous is None and plan.stores.any():
            self.previous = torch.zeros_like(self.x)
        if self.gain is None and plan.adaptive.any():
            self.gain = torch.ones(self.batch, dtype=torch.float32, device=self.device)

    def inpaint(self, images: Tensor, redraw: str) -> None:
        """From now on impose known pixels; arguments as Known.begin's. Ends when ``known`` is set to None."""
        self._known = self.known = self._known or Known(self.x)
        self.known.begin(images, redraw)

    def tensors(self) -> list[Tensor]:
        """What a step reads and writes."""
        return [t for t in (self.x, self.counters, self.previous, self.gain) if t is not None]

    def measure(self, score: Tensor, adaptive: Tensor) -> None:
        """gain ← 1 over the root mean square of each sample's score [B, C, H, W] where its row is adaptive, else 1."""
        rms = score.float().square().mean((1, 2, 3)).sqrt()
        torch.where(adaptive[self.row], rms.reciprocal(), torch.ones_like(rms), out=self.gain)

    def refill(self, jobs: Iterator[Job]) -> None:
        """Start the next of ``jobs`` in every idle slot, as long as there are any."""
        idle = (i for i, job in enumerate(self.jobs) if job is None)
        taken = list(zip(idle, jobs))  # noqa: B905 - idle first: an exhausted zip has taken no job too many
        for _, group in groupby(taken, key=lambda item: (item[1].plan.digest, item[1].init is None)):
            self._start(list(group))

    def advance(self, steps: int) -> None:
        """Mirror ``steps`` steps of the device."""
        for i in self.live:
            self.done[i] += steps

    def steps_to_harvest(self) -> int:
        """Steps until the first live slot finishes."""
        return min(self.jobs[i].plan.nfe - self.done[i] for i in self.live)

    def harvest(self) -> tuple[list[Job], Tensor, Tensor] | None:
        """Empty the finished slots: their jobs, x [k, C, H, W] and bad_row [k] (copies on the device), or None."""
        finished = [i for i in self.live if self.done[i] == self.jobs[i].plan.nfe]
        if not finished:
            return None
        jobs = [self.jobs[i] for i in finished]
        for i in finished:
            self.jobs[i] = None
        index = to_device(finished, self.device)
        return jobs, self.x.index_select(0, index).contiguous(), self.bad_row.index_select(0, index)

    def drop(self, slots: list[int]) -> None:
        """Make these slots idle, whatever they held."""
        for i in slots:
            self.jobs[i] = None
        self.stop.index_fill_(0, to_device(slots, self.device), 0)

    def clear(self) -> None:
        """Make every slot idle, whatever it held."""
        self.jobs = [None] * self.batch
        self.stop.zero_()

    def _start(self, taken: list[tuple[int, Job]]) -> None:
        """Write counters and initial state of slots whose jobs start alike: one transfer, then device work only."""
        plan = taken[0][1].plan
        columns = [
            (slot, job.rows.start, job.rows.stop, as_int64(job.seed), job.sample_id, NO_BAD_ROW, job.index)
            for slot, job in taken
        ]
        values = to_device(columns, self.device).t().contiguous()  # [7, k]
        slot, counters, indices = values[0], values[1:6], values[6]
        if taken[0][1].init is not None:
            x = torch.stack([job.init for _, job in taken])
        else:
            x = torch.empty(len(taken), *self.shape, dtype=torch.float32, device=self.device)
            ops.noise_fill_(x, counters[2], counters[3], 0, SAMPLE_STREAM, plan.start)
            started(x, plan)
        if self.known is not None:
            x = self.known.start(x, slot, indices, counters[2], counters[3], plan.sigma[0])
        self.x.index_copy_(0, slot, x)
        self.counters.index_copy_(1, slot, counters)
        for i, job in taken:
            self.jobs[i], self.done[i] = job, 0


def started(u: Tensor, plan: Plan) -> Tensor:
    """The first states of chains from their draws u [k, C, H, W] of the law ``plan.start``, in place."""
    shift = plan.start_shift
    if isinstance(shift, np.ndarray):
        shift = torch.tensor(shift, dtype=torch.float32, device=u.device)
    return u.mul_(plan.start_scale).add_(shift)
