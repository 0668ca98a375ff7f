"""``await service.draw(…)``: the bits of ``submit``, an event loop that goes on, requests that end with their task."""

import asyncio
import threading
from concurrent.futures import Future

import pytest
import torch

from sgm_engine.errors import QueueFull, ServiceClosed
from sgm_engine.service.awaited import awaited
from sgm_engine.service.service import SamplerService
from tests.service.services import PLAN, engine, free, gate, no_thread_left  # noqa: F401 - fixtures


def test_it_gives_what_submit_gives(free):
    async def main():
        with SamplerService(engine(free)) as service:
            got = await asyncio.gather(*(service.draw(n, seed=n, plan=PLAN, first_id=5) for n in range(6)))
            return got, [service.submit(n, seed=n, plan=PLAN, first_id=5).result() for n in range(6)]

    got, want = asyncio.run(main())
    assert all(map(torch.equal, got, want))


def test_the_event_loop_goes_on_while_there_is_no_room(gate):
    """The model runs only once the loop has: a submit that waited in the loop would never end."""

    async def main():
        with SamplerService(engine(gate), capacity=4) as service:
            first, second = (asyncio.create_task(service.draw(3, seed=s, plan=PLAN)) for s in (1, 2))
            await asyncio.sleep(0.05)
            assert not second.done() and service.metrics().pending == 3
            gate.open.set()
            return await asyncio.gather(first, second)

    got = asyncio.run(asyncio.wait_for(main(), 30))
    with SamplerService(engine(gate)) as service:
        assert all(
            torch.equal(x, service.submit(3, seed=s, plan=PLAN).result()) for x, s in zip(got, (1, 2), strict=True)
        )


def test_a_task_that_is_cancelled_takes_its_request_along(gate):
    async def main():
        with SamplerService(engine(gate)) as service:
            task = asyncio.create_task(service.draw(4, plan=PLAN))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open.set()
        return service.metrics()

    metrics = asyncio.run(main())
    assert metrics.pending == 0 and metrics.requests["cancelled"] == 1 and metrics.requests["finished"] == 0


@pytest.mark.parametrize("accepted", [True, False])
def test_and_one_that_waits_for_room_is_cancelled_when_it_gets_some(accepted):
    room, request, waits = threading.Event(), Future(), []

    def submit(wait):
        waits.append(wait)
        if wait == 0:
            raise QueueFull("no room")
        assert room.wait(30)
        if not accepted:
            raise ServiceClosed("shut down")
        return request

    async def main():
        task = asyncio.create_task(awaited(submit, None))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    room.set()
    for thread in threading.enumerate():
        if thread.name == "SamplerService.draw":
            thread.join(30)
    assert waits == [0, None] and request.cancelled() == accepted


def test_its_errors_are_those_of_submit(gate):
    async def main():
        with SamplerService(engine(gate), capacity=4) as service:
            task = asyncio.create_task(service.draw(4, plan=PLAN))
            await asyncio.sleep(0)
            for wait in (0, 0.01):
                with pytest.raises(QueueFull, match="capacity is 4"):
                    await service.draw(1, plan=PLAN, wait=wait)
            late = asyncio.create_task(service.draw(1, plan=PLAN))
            await asyncio.sleep(0.05)
            service.shutdown(wait=False)
            with pytest.raises(ServiceClosed):
                await late
            with pytest.raises(ValueError, match="n must be at most capacity"):
                await service.draw(5, plan=PLAN)
            gate.open.set()
            return await task

    assert asyncio.run(main()).shape == (4, 1, 4, 4)
