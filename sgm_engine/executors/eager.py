"""The step in PyTorch and the fused update, on any device; the other executors fall back on parts of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Slots, Tables
from sgm_engine.kernels import ops


class EagerExecutor:
    """Calls the network and the update step by step, on any device."""

    name, captures = "eager", 0

    def __init__(self) -> None:
        self.score: Tensor | None = None

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        self.network, self.slots, self.tables = network, slots, tables
        self.level = torch.zeros(slots.batch, dtype=torch.int64, device=slots.device)

    def sync_weights(self, force: bool = False) -> None:
        self.network.sync(force)

    def sibling(self) -> EagerExecutor:
        return EagerExecutor()

    def run(self, steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                self.step()

    def step(self) -> None:
        s, t = self.slots, self.tables
        torch.index_select(t.level, 0, s.row, out=self.level)
        self.score = self.network(s.x, self.level)
        if s.gain is not None:
            s.measure(self.score, t.adaptive)
        keep = None if s.previous is None else t.keep
        slots = (s.row, s.stop, s.seed, s.sample_id, s.bad_row, s.previous)
        known = {} if s.known is None else s.known.arguments(t)
        ops.langevin_update_(s.x, self.score, t.coef, t.draw, *slots, keep, s.gain, **known)
