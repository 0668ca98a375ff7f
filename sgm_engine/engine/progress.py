"""What a running request tells: counts, each step to a callback, and a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sgm_engine.executors.slots import Slots
from sgm_engine.keys import to_device
from sgm_engine.pace import Lines


@dataclass
class Stats:
    """Counts since the engine was made.

    steps: network calls, each on the whole batch · nfe: evaluations that advanced a sample
    harvested: samples finished · captures: graphs captured
    """

    steps: int = 0
    nfe: int = 0
    harvested: int = 0
    captures: int = 0


class StepInfo:
    """One step, as a callback sees it; k live slots. Valid during the call only.

    step: steps since the request began · sample_ids, rows, levels, sigmas: length k · x: [k, C, H, W] after the step
    before: x before it · denoised: before + σ²·score, the network's estimate of the clean image
    """

    def __init__(self, step: int, slots: Slots, live: list[int], x_before: Tensor, score: Tensor):
        jobs = [slots.jobs[i] for i in live]
        self.step = step
        self.sample_ids = [job.sample_id for job in jobs]
        self.rows = [slots.done[i] - 1 for i in live]
        self.levels = [int(job.plan.level[row]) for job, row in zip(jobs, self.rows, strict=True)]
        self.sigmas = [float(job.plan.sigma[row]) for job, row in zip(jobs, self.rows, strict=True)]
        self._slots, self._live, self._x_before, self._score = slots, live, x_before, score

    @cached_property
    def x(self) -> Tensor:
        return self._pick(self._slots.x)

    @cached_property
    def before(self) -> Tensor:
        return self._pick(self._x_before)

    @cached_property
    def denoised(self) -> Tensor:
        x, score = self.before, self._pick(self._score).float()
        variance = torch.tensor(self.sigmas, dtype=torch.float32, device=x.device).square()[:, None, None, None]
        return x + variance * score

    def _pick(self, t: Tensor) -> Tensor:
        k = len(self._live)
        return t[:k] if self._live[-1] == k - 1 else t[to_device(self._live, t.device)]


@contextmanager
def counting(
    total: int | None, unit: str = "sample", show: bool | str = True, after: float = 0.0
) -> Iterator[Callable[[int], object]]:
    """A function to tell of things done. show: True, a bar on a terminal, elsewhere a line now and then (Lines);
    "bar", a bar wherever stderr goes; False, nothing. after: seconds until the bar appears; it is gone at the end."""
    if not show:
        yield lambda n: None
    elif show != "bar" and (sys.stderr is None or not sys.stderr.isatty()):
        yield Lines(total, f"{unit}s").update
    else:
        from tqdm import tqdm

        with tqdm(total=total, unit=unit, delay=after, leave=not after) as bar:
            yield bar.update


@contextmanager
def progress_bar(total: int | None, nfe: int, show: bool | str) -> Iterator[Callable[[int], None]]:
    """A function to tell of evaluations done, nfe of which are a sample."""
    done = said = 0

    with counting(total, "sample", show) as tell:

        def advance(evaluations: int) -> None:
            nonlocal done, said
            done += evaluations
            tell(done // nfe - said)
            said = done // nfe

        yield advance
