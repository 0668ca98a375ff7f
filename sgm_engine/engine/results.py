"""What has come out of a request so far: samples and the rows at which they diverged, on the device until asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgm_engine.errors import Divergence, SampleDiverged
from sgm_engine.executors.slots import NO_BAD_ROW
from sgm_engine.keys import to_device
from sgm_engine.plans.plan import Plan


class Results:
    """Samples float32 [n, C, H, W], those of ``sample_ids`` in order, put in as they are harvested."""

    def __init__(self, sample_ids: Sequence[int], plan: Plan, shape: tuple[int, int, int], device: torch.device):
        n = len(sample_ids)
        self.sample_ids, self.plan = sample_ids, plan
        self.samples = torch.zeros(n, *shape, dtype=torch.float32, device=device)
        self.bad_row = torch.full((n,), NO_BAD_ROW, dtype=torch.int64, device=device)
        self.finished: list[int] = []

    def put(self, index: list[int], x: Tensor, bad_row: Tensor) -> None:
        """x [k, C, H, W] are the samples at ``index``; bad_row [k], rows of the plan, says which of them diverged."""
        where = to_device(index, self.samples.device)
        self.samples.index_copy_(0, where, x)
        self.bad_row.index_copy_(0, where, bad_row)
        self.finished += index

    def good(self) -> tuple[list[Divergence], list[int], Tensor]:
        """What diverged, and the ids and samples of the rest of what is finished; waits for the device."""
        rows, order = self.bad_row.tolist(), sorted(self.finished)
        diverged = [divergence(self.sample_ids[i], self.plan, rows[i]) for i in order if rows[i] != NO_BAD_ROW]
        good = [i for i in order if rows[i] == NO_BAD_ROW]
        return diverged, [self.sample_ids[i] for i in good], self.samples[good]

    def all(self) -> Tensor:
        """All n samples, or SampleDiverged; waits for the device."""
        if bool((self.bad_row != NO_BAD_ROW).any()):
            raise SampleDiverged(*self.good())
        return self.samples


def divergence(sample_id: int, plan: Plan, row: int) -> Divergence:
    return Divergence(sample_id, row, int(plan.level[row]), float(plan.sigma[row]))
