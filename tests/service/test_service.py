"""The service: a request's samples are its own whoever it runs with; a fair and bounded queue; every end is told."""

import pytest
import torch

from bench.service import closed_loop, differing, requests, tiny
from sgm_engine.errors import SampleDiverged
from sgm_engine.executors.slots import Tables
from sgm_engine.plans.plan import annealed_langevin, ddim
from sgm_engine.service import service as module
from sgm_engine.service.queue import FairQueue, Request
from sgm_engine.service.service import SamplerService
from tests.service.services import LONG, PLAN, SHAPE, SIGMAS, Gate, engine, free, gate  # noqa: F401 - fixtures


@pytest.mark.parametrize("executor", ["native", "eager"])
def test_mixed_requests_equal_their_solo_runs(executor):
    """Eight clients at once; python -m bench.service is the same with 500 requests each."""
    one = tiny(executor)
    asked = requests(8, 20 if executor == "native" else 2, one.shape)
    with SamplerService(one) as service:
        got, metrics = closed_loop(service, asked)
    assert differing(asked, got, tiny(executor)) == 0
    assert metrics.finished == sum(request["n"] for mine in asked for request in mine)
    assert metrics.requests["finished"] == sum(map(len, asked)) and metrics.pending == metrics.running == 0


def test_slots_stay_full_while_there_is_work():
    one = tiny("native")
    asked = [request for mine in requests(8, 10, one.shape) for request in mine]
    with SamplerService(one, capacity=10_000) as service:
        with one._request():  # nothing runs before everything is there
            futures = [service.submit(**request) for request in asked]
        for future in futures:
            future.result()
        assert service.metrics().occupancy >= 0.95


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


def test_a_short_request_overtakes_a_long_one(gate):
    done = []
    with SamplerService(engine(gate)) as service:
        long = service.submit(200, plan=LONG)
        long.add_done_callback(lambda _: done.append("long"))
        service.submit(2, plan=PLAN).add_done_callback(lambda _: done.append("short"))
        gate.open.set()  # the long one has every slot
    assert done == ["short", "long"] and torch.equal(long.result()[7:8], engine(gate).sample(1, plan=LONG, first_id=7))
