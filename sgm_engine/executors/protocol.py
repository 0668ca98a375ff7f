"""Executors run steps. A step is: look up the levels, call the network, update the state, advance the rows.

An executor is any object with the methods of ``Executor``. It works on buffers that it is handed once (``Slots``,
``Tables``) and never reads anything back to the host: between two calls of ``run`` the engine refills, harvests,
reports and cancels, all from its own mirror of the rows.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Slots, Tables


class Executor(Protocol):
    """What an engine asks of an executor: bind, then for each request sync_weights and any number of run.

    name: as in ``Engine(executor=…)`` · captures: graphs captured so far (0 where there is nothing to capture)
    score: the network's output [B, C, H, W] of the last step run, valid until the next ``run``; None before the first
    """

    name: str
    captures: int
    score: Tensor | None

    def bind(self, network: Network, slots: Slots, tables: Tables) -> None:
        """Work on these from now on. The tensors of slots stay; those of tables may be replaced between requests."""

    def sync_weights(self, force: bool = False) -> None:
        """Make the next step see the module's current parameters; notice buffers that have moved. Slots may be live.

        force: make every copy of a weight anew, also those whose source looks unchanged.
        """

    def run(self, steps: int) -> None:
        """Enqueue ``steps`` ≥ 1 steps. At most as many as the nearest live slot has left; idle slots stay untouched."""

    def sibling(self) -> Executor:
        """A new one of the kind, for other slots, that shares with this one what can be shared."""
