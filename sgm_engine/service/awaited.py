"""Requests of asyncio: room in the queue is waited for beside the event loop, never in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

from sgm_engine.errors import QueueFull


async def awaited(submit: Callable[[float | None], Future[Tensor]], wait: float | None) -> Tensor:
    """The samples of ``submit(seconds to wait for room)``. A task that is cancelled cancels its request."""
    try:
        future = submit(0)
    except QueueFull:
        if wait == 0:
            raise
        future = await _admitted(submit, wait)
    return await asyncio.wrap_future(future)


async def _admitted(submit: Callable[[float | None], Future[Tensor]], wait: float | None) -> Future[Tensor]:
    """submit(wait), in a thread of its own: as many wait at a time as there are requests without room."""
    outcome: Future[Future[Tensor]] = Future()

    def work() -> None:
        try:
            outcome.set_result(submit(wait))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="SamplerService.draw").start()
    try:
        return await asyncio.shield(asyncio.wrap_future(outcome))
    except asyncio.CancelledError:
        outcome.add_done_callback(_withdraw)
        raise


def _withdraw(outcome: Future[Future[Tensor]]) -> None:
    """Cancel a request that nobody waits for, whenever it is accepted."""
    if outcome.exception() is None:
        outcome.result().cancel()
