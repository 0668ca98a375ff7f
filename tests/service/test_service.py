"""The service: a request's samples are its own whoever it runs with; a fair and bounded queue; every end is told."""

import asyncio
import multiprocessing
import os
import threading
from concurrent.futures import CancelledError

import pytest
import torch

from bench.service import closed_loop, differing, requests, tiny
from sgm_engine.engine.engine import Engine
from sgm_engine.errors import DeadlineExceeded, EngineBusy, QueueFull, SampleDiverged, ServiceClosed
from sgm_engine.executors.slots import Tables
from sgm_engine.plans.plan import annealed_langevin, ddim
from sgm_engine.service import queue as queueing
from sgm_engine.service import service as module
from sgm_engine.service.queue import FairQueue, Request
from sgm_engine.service.service import SamplerService

SIGMAS, SHAPE = [1.0, 0.3, 0.1], (1, 4, 4)
PLAN = annealed_langevin(SIGMAS, 2, 1e-3)  # 7 rows
LONG = annealed_langevin(SIGMAS, 20, 1e-3)  # 61 rows


class Gate:
    """The exact score of data at 0, that runs only while ``open``; ``at`` fails at one level."""

    def __init__(self, fails_at=None):
        self.open, self.entered, self.fails_at = threading.Event(), threading.Event(), fails_at

    def __call__(self, x, level):
        self.entered.set()
        assert self.open.wait(30)
        if self.fails_at is not None and (level == self.fails_at).any():
            raise ArithmeticError("the model has a bad day")
        return -x / torch.tensor(SIGMAS)[level].square()[:, None, None, None]


def engine(model, batch=4):
    return Engine(model, batch, sigmas=SIGMAS, shape=SHAPE)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def free():
    gate = Gate()
    gate.open.set()
    return gate


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert not [t for t in threading.enumerate() if t.name == "SamplerService"]


# -- a request's samples are its own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["native", "eager"])
def test_mixed_requests_equal_their_solo_runs(executor):
    """Eight clients; python -m bench.service is the same with 500 requests each."""
    one = tiny(executor)
    asked = requests(8, 20 if executor == "native" else 2, one.shape)
    with SamplerService(one) as service:
        got, metrics = closed_loop(service, asked)
    assert differing(asked, got, tiny(executor)) == 0
    assert metrics.occupancy >= (0.95 if executor == "native" else 0.8)  # of the short one the end is a good part
    assert metrics.finished == sum(request["n"] for mine in asked for request in mine)
    assert metrics.requests["finished"] == sum(map(len, asked)) and metrics.pending == metrics.running == 0


def test_more_plans_than_the_tables_hold(free, monkeypatch):
    """Plans then wait until every slot is idle, and no row of a running plan is overwritten."""
    monkeypatch.setattr(module, "ROWS", 0)
    small = engine(free)
    small._tables = Tables(small.device, capacity=16)
    small._bind(small._executor)
    asked = [dict(n=2, seed=i, plan=annealed_langevin(SIGMAS, 1 + i % 5, 1e-3)) for i in range(20)]
    with SamplerService(small) as service:
        futures = [service.submit(**request) for request in asked]
    solo = engine(free)
    assert all(torch.equal(f.result(), solo.sample(**r)) for f, r in zip(futures, asked, strict=True))


def test_a_sample_that_diverges_fails_its_request_alone(free):
    bad = torch.zeros(3, *SHAPE)
    bad[1, 0, 0, 0] = float("nan")
    with SamplerService(engine(free)) as service:
        service.submit(1, plan=LONG).result()  # its rows come first in the tables
        before, broken, after = (service.submit(3, 1, PLAN, 10, init) for init in (None, bad, None))
        with pytest.raises(SampleDiverged, match="sample 11 at row 0") as told:
            broken.result()
    assert told.value.sample_ids == [10, 12]
    init = bad.nan_to_num()
    assert torch.equal(told.value.samples, engine(free).sample(3, 1, PLAN, 10, init=init)[[0, 2]])
    assert torch.equal(before.result(), engine(free).sample(3, 1, PLAN, 10)) and torch.equal(
        after.result(), before.result()
    )


def test_an_error_of_the_model_reaches_the_requests_in_its_batch():
    gate = Gate(fails_at=2)
    gate.open.set()
    harmless = ddim(SIGMAS[:2])  # never at level 2
    with SamplerService(engine(gate)) as service:
        for _ in range(2):  # and the service goes on
            with pytest.raises(ArithmeticError, match="bad day"):
                service.submit(9, plan=PLAN).result()
            assert torch.equal(service.submit(9, 5, harmless).result(), engine(gate).sample(9, 5, harmless))
    assert service.metrics().requests == {"finished": 2, "failed": 2, "cancelled": 0, "late": 0}


# -- order and bounds --------------------------------------------------------------------------------------------------


def order(*asked):
    """Which request each turn is of, all of them there from the start; asked: (n, plan)."""
    queue = FairQueue()
    everyone = [Request([None] * n, plan, 0.0) for n, plan in asked]
    for request in everyone:
        queue.push(request)
    return [everyone.index(queue.pop()[0]) for _ in iter(queue.peek, None)]


def test_equal_plans_take_turns():
    assert order((4, PLAN), (2, PLAN), (3, PLAN)) == [0, 1, 2, 0, 1, 2, 0, 2, 0]


def test_unequal_plans_share_evaluations():
    first = order((50, LONG), (500, PLAN))[:200]
    assert first.count(1) / first.count(0) == pytest.approx(LONG.nfe / PLAN.nfe, rel=0.1)


@pytest.mark.parametrize("plan", [PLAN, LONG])
def test_newcomers_starve_nobody(plan):
    """One new request comes for every turn, for ever: the old one keeps its share."""
    queue = FairQueue()
    old = Request([None] * 100, plan, 0.0)
    queue.push(old)
    for _ in range(100):
        queue.push(Request([None], PLAN, 0.0))
        queue.pop()
    assert old.next >= 3


def test_a_short_request_overtakes_a_long_one(free):
    done = []
    with SamplerService(engine(free)) as service:
        long = service.submit(200, plan=LONG)
        long.add_done_callback(lambda _: done.append("long"))
        service.submit(2, plan=PLAN).add_done_callback(lambda _: done.append("short"))
    assert done == ["short", "long"] and torch.equal(long.result()[7:8], engine(free).sample(1, plan=LONG, first_id=7))


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


def test_callers_enter_in_the_order_of_arrival(gate):
    entered = []
    with SamplerService(engine(gate, batch=8), capacity=5) as service:
        service.submit(4, plan=LONG)
        service.submit(1, plan=PLAN)  # ends first: then there is room for 1

        def client(n):
            service.submit(n, plan=PLAN)
            entered.append(n)

        threads = []
        for n in (4, 1):  # there might never be room for 4 if 1 could go first
            threads.append(threading.Thread(target=client, args=(n,)))
            threads[-1].start()
            while len(service._door.waiting) < len(threads):
                pass
        gate.open.set()
        for thread in threads:
            thread.join()
    assert entered == [4, 1]


# -- ends --------------------------------------------------------------------------------------------------------------


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
        assert gate.entered.wait(30)
        threading.Timer(0.1, gate.open.set).start()
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


def test_callbacks_may_submit_but_not_wait(free):
    told, out = [], threading.Event()
    one = engine(free)

    def callback(_):
        told.append(service.submit(1, plan=PLAN))
        try:
            one.sample(1, plan=PLAN)
        except EngineBusy as error:
            told.append(error)
        out.set()

    with SamplerService(one) as service:
        service.submit(1, plan=PLAN).add_done_callback(callback)
        assert out.wait(30)
    assert told[0].result().shape == (1, *SHAPE) and isinstance(told[1], EngineBusy)


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
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
