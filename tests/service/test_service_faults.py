"""The service among clients and systems that behave badly: slow callbacks, no threads left, forks, far deadlines."""

import threading

import pytest
import torch

from sgm_engine.service.queue import TIDY, FairQueue, Request
from sgm_engine.service.service import SamplerService
from tests.forks import forked, forks
from tests.service.services import PLAN, SHAPE, engine, free, gate, no_thread_left  # noqa: F401 - fixtures


def test_a_request_whose_thread_cannot_start_leaves_no_trace(free, monkeypatch):
    with SamplerService(engine(free), capacity=4) as service:
        with monkeypatch.context() as m:
            m.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("can't start")))
            for _ in range(3):
                with pytest.raises(RuntimeError, match="can't start"):
                    service.submit(4)
        assert service.metrics().pending == 0
        assert service.submit(4, wait=0).result().shape == (4, *SHAPE)


def test_a_slow_callback_holds_up_nobody_else(gate):
    called, other, order = threading.Event(), threading.Event(), []
    with SamplerService(engine(gate)) as service:
        slow = service.submit(2, seed=1, plan=PLAN)
        slow.add_done_callback(lambda _: (called.set(), order.append(other.wait(30))))
        slow.add_done_callback(order.append)  # after the one before it
        slow.add_done_callback(lambda _: 1 / 0)  # logged, as those of any future
        gate.open.set()
        assert called.wait(30)
        x = service.submit(2, seed=2, plan=PLAN).result(30)  # while that callback waits for it
        other.set()
    assert torch.equal(x, engine(gate).sample(2, 2, PLAN)) and order == [True, slow]


def test_a_callback_may_close_the_service(free):
    service = SamplerService(engine(free))
    closed = threading.Event()
    service.submit(1, plan=PLAN).add_done_callback(lambda _: (service.shutdown(), closed.set()))
    assert closed.wait(30)
    service.shutdown()


def test_without_threads_callbacks_run_in_the_service(gate, monkeypatch):
    called = threading.Event()
    with SamplerService(engine(gate)) as service:
        future = service.submit(1, plan=PLAN)
        future.add_done_callback(lambda _: called.set())
        with monkeypatch.context() as m:
            m.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("can't start")))
            gate.open.set()
            assert called.wait(30)


@forks
@pytest.mark.parametrize("leaves", ["the block", "with an error", "asking for metrics"])
def test_a_fork_may_leave_whatever_the_parent_holds(free, leaves):
    """The lock is held when the process forks, by a thread that the child does not have."""
    service, held, go = SamplerService(engine(free)), threading.Event(), threading.Event()

    def hold():
        with service._lock:
            held.set()
            go.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)

    def leave():
        if leaves == "asking for metrics":
            with pytest.raises(RuntimeError, match="before a fork"):
                service.metrics()
        else:
            service.__exit__(KeyError if leaves == "with an error" else None)

    try:
        with forked(leave):
            pass
    finally:
        go.set()
        holder.join()
        service.shutdown()


def test_ended_requests_are_not_kept_until_their_deadline(free):
    with SamplerService(engine(free)) as service:
        for _ in range(5 * TIDY):
            service.submit(1, plan=PLAN, deadline=86400).result()
        assert len(service._deadlines._heap) <= TIDY + 1


def test_ended_requests_are_not_kept_until_their_turn():
    queue = FairQueue()
    for i in range(5 * TIDY):
        queue.push(request := Request([()], PLAN, 0.0))
        request.over = i > 0
    assert len(queue._heap) <= TIDY + 1 and queue.pop()[0].over is False
