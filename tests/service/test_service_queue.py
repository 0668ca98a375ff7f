"""The service's queue: bounded and fair; every end is told; bad calls."""

import asyncio
import multiprocessing
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from sgm_engine.errors import DeadlineExceeded, QueueFull, ServiceClosed
from sgm_engine.service import queue as queueing
from sgm_engine.service import service as module
from sgm_engine.service.queue import Request
from sgm_engine.service.service import SamplerService
from tests.forks import forks
from tests.service.services import LONG, PLAN, SHAPE, engine, free, gate  # noqa: F401 - fixtures


def test_the_queue_is_bounded(gate):
    with SamplerService(engine(gate), capacity=10) as service:
        first = [service.submit(5), service.submit(5)]
        with pytest.raises(QueueFull, match="10 samples are pending and capacity is 10"):
            service.submit(1, wait=0)
        with pytest.raises(QueueFull):
            service.submit(1, wait=0.05)
        with pytest.raises(QueueFull):
            service.submit(1, deadline=0.05)
        got = []
        waiting = threading.Thread(target=lambda: got.append(service.submit(10, seed=3).result()))
        waiting.start()
        assert service.metrics().pending == 10 and not got
        gate.open.set()
        waiting.join()
    assert torch.equal(got[0], engine(gate).sample(10, seed=3)) and all(f.done() for f in first)


def waits(service, n):
    """Return when n callers wait for room."""
    while len(service._door.waiting) < n:
        time.sleep(0.001)


def test_callers_enter_in_the_order_of_arrival(gate):
    entered = []
    with SamplerService(engine(gate, batch=8), capacity=5) as service:
        enter = service._door.enter
        service._door.enter = lambda n, wait: (enter(n, wait), entered.append(n))  # under the service's lock
        service.submit(4, plan=LONG)
        service.submit(1, plan=PLAN)  # ends first: then there is room for 1

        threads = []
        for n in (4, 1):  # there might never be room for 4 if 1 could go first
            threads.append(threading.Thread(target=service.submit, args=(n,), kwargs={"plan": PLAN}))
            threads[-1].start()
            waits(service, len(threads))
        gate.open.set()
        for thread in threads:
            thread.join()
    assert entered == [4, 1, 4, 1]


def test_cancel_frees_slots_and_changes_nobody_else(gate):
    with SamplerService(engine(gate)) as service:
        running = service.submit(50, plan=LONG)
        assert gate.entered.wait(30)  # it has every slot
        queued, other = service.submit(9, plan=LONG), service.submit(6, 4, PLAN)
        assert running.cancel() and queued.cancel()
        gate.open.set()
        assert torch.equal(other.result(), engine(gate).sample(6, 4, PLAN))
        with pytest.raises(CancelledError):
            running.result()
    metrics = service.metrics()
    assert metrics.requests == {"finished": 1, "failed": 0, "cancelled": 2, "late": 0} and metrics.pending == 0
    assert service.engine.stats.harvested == 6, "slots of a cancelled request went on"


def test_a_deadline_frees_slots_and_hands_over_what_is_finished(gate):
    with SamplerService(engine(gate, batch=2)) as service:
        late, other = service.submit(4, 1, LONG, deadline=0.3), service.submit(4, 2, PLAN)
        early = threading.Timer(0.4, gate.open.set)
        early.start()
        with pytest.raises(DeadlineExceeded, match="0 of 4 samples") as told:
            late.result()
        assert isinstance(told.value, TimeoutError) and told.value.samples.shape == (0, *SHAPE)
        assert torch.equal(other.result(), engine(gate, 2).sample(4, 2, PLAN))
        assert service.submit(2, 1, PLAN, deadline=60).result().shape == (2, *SHAPE)
        early.join()
    assert service.metrics().requests["late"] == 1


def test_leaving_the_block_finishes_what_was_accepted(free):
    with SamplerService(engine(free)) as service:
        futures = [service.submit(3, seed, LONG) for seed in range(10)]
    assert all(future.done() for future in futures)
    with pytest.raises(ServiceClosed, match="shut down"):
        service.submit(1)


def test_an_exception_in_the_block_cancels(gate):
    with pytest.raises(KeyError), SamplerService(engine(gate), capacity=4) as service:
        futures, refused = [service.submit(4, plan=LONG)], []

        def client():
            try:
                service.submit(1)
            except ServiceClosed as error:
                refused.append(error)

        waiting = threading.Thread(target=client)
        waiting.start()
        waits(service, 1)
        futures[0].add_done_callback(lambda _: gate.open.set())  # nothing ends before it is cancelled
        raise KeyError("the caller's own")
    waiting.join()
    assert futures[0].cancelled() and len(refused) == 1


def test_the_thread_ends_by_itself_when_idle_and_comes_back(free, monkeypatch):
    monkeypatch.setattr(module, "LINGER", 0.05)
    service = SamplerService(engine(free))
    for _ in range(2):
        service.submit(1, plan=PLAN).result()
        worker = service._worker
        if worker is not None:
            worker.join(10)
        assert service._worker is None


def test_the_engine_is_free_between_requests(free):
    one = engine(free)
    with SamplerService(one) as service:
        x = service.submit(5, 3, PLAN).result()
        assert torch.equal(one.sample(5, 3, PLAN), x)


def test_callbacks_may_submit_and_draw(gate):
    told, out = [], threading.Event()
    one = engine(gate)

    def callback(_):
        told.append(service.submit(1, plan=PLAN))
        told.append(one.sample(1, plan=PLAN))  # in a moment without work
        out.set()

    with SamplerService(one) as service:
        service.submit(1, plan=PLAN).add_done_callback(callback)
        gate.open.set()  # so that it is the service's thread that calls back
        assert out.wait(30)
    assert torch.equal(told[0].result(), told[1])


def test_asyncio(free):
    async def main():
        with SamplerService(engine(free)) as service:
            return await asyncio.gather(*(asyncio.wrap_future(service.submit(2, s, PLAN)) for s in range(3)))

    assert all(torch.equal(x, engine(free).sample(2, s, PLAN)) for s, x in enumerate(asyncio.run(main())))


def test_nothing_asked_is_answered_at_once(gate):
    with SamplerService(engine(gate)) as service:
        assert service.submit(0).result(0).shape == (0, *SHAPE)


def _child(service, queue):
    try:
        service.submit(1)
    except RuntimeError as error:
        queue.put(str(error))


@forks
def test_after_a_fork(free):
    service, queue = SamplerService(engine(free)), multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(service, queue))
    child.start()
    assert "spawn" in queue.get(timeout=30)
    child.join()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(n=-1), ValueError, "n must be at least 0"),
        (dict(n=2.0), TypeError, "n must be an integer"),
        (dict(n=11), ValueError, "capacity = 10, got 11"),
        (dict(n=10**12), ValueError, "capacity = 10, got 1000000000000"),  # before any list of them is made
        (dict(n=1, seed=-1), ValueError, "seed"),
        (dict(n=2, seed=[1]), ValueError, "n = 2 of them, got 1"),
        (dict(n=1, plan="ddim"), TypeError, "plan must be a Plan"),
        (dict(n=1, first_id=2**56), ValueError, "first_id"),
        (dict(n=1, init=torch.zeros(2, *SHAPE)), ValueError, "init must be"),
        (dict(n=1, deadline=-1), ValueError, "deadline must be seconds"),
        (dict(n=1, wait="1"), ValueError, "wait must be seconds"),
    ],
)
def test_bad_calls(free, arguments, error, says):
    with SamplerService(engine(free), capacity=10) as service, pytest.raises(error, match=says):
        service.submit(**arguments)
    assert service.metrics().pending == 0


def test_bad_service(free):
    with pytest.raises(TypeError, match=r"SamplerService\(Engine\(model\)\)"):
        SamplerService(free)
    with pytest.raises(ValueError, match="capacity"):
        SamplerService(engine(free), capacity=0)


def test_percentiles_of_known_times(monkeypatch):
    meter = queueing.Meter()
    monkeypatch.setattr(queueing, "monotonic", lambda: 10.0)
    for wait in range(101):
        request = Request([None], PLAN, 0.0)
        request.started = wait / 100
        meter.end(request, "finished")
    assert meter.percentiles() == (0.5, 0.99, 10.0, 10.0)
