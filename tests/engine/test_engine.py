"""The engine: sample i is sample i, nothing is wasted or lost, and every bad call is answered in one clear line."""

import math
import threading
from itertools import count

import numpy as np
import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.kernels import noise
from sgm_engine.plans.plan import Plan, annealed_langevin, consistent_annealed
from tests.engine.engines import (
    PLAN,
    SHAPE,
    SIGMAS,
    engine,
    gaussian,
    net,  # noqa: F401 - fixtures
)


@pytest.fixture(scope="module", params=["eager", "native"])
def real(net, request):
    """Makes engines on a real network at compute batch 8."""
    return lambda: Engine(net, 8, executor=request.param)


@pytest.fixture(scope="module")
def sixteen(real):
    """Samples 0–15, the bytes that every other way of asking must give."""
    return real().sample(16, seed=3, plan=PLAN)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 64])
def test_any_request_size(real, sixteen, n):
    x = real().sample(n, seed=3, plan=PLAN)
    assert x.shape == (n, *SHAPE) and x.dtype == torch.float32
    assert torch.equal(x[:16], sixteen[:n])


def test_any_order(real, sixteen):
    ids = [5, 0, 15, 3, 9, 9, 1, 14, 2, 7, 11]
    got = list(real().stream(ids, seed=3, plan=PLAN))
    assert [i for i, _ in got] == ids
    assert all(torch.equal(x, sixteen[i]) for i, x in got)


def test_resumed_in_pieces(real, sixteen):
    e = real()
    pieces = [e.sample(k, seed=3, plan=PLAN, first_id=first) for first, k in ((0, 5), (5, 1), (6, 10))]
    assert torch.equal(torch.cat(pieces), sixteen)


def test_a_seed_and_a_start_of_its_own_for_each_sample(real, sixteen):
    """Given the start that it would have had, a sample is what it would have been; another start, another sample."""
    e = real()
    x0 = torch.from_numpy(noise.fill((4, *SHAPE), [3] * 4, np.arange(4), 0, kind="uniform"))
    assert torch.equal(e.sample(4, 3, PLAN, init=x0), sixteen[:4])
    assert not torch.equal(e.sample(4, 3, PLAN, init=x0 + 0.1), sixteen[:4])
    x = e.sample(3, [5, 3, 2**64 - 1], PLAN, first_id=2)
    assert torch.equal(x[1], sixteen[2])
    assert torch.equal(x[2:], e.sample(1, 2**64 - 1, PLAN, first_id=2))


def test_after_other_work_on_the_same_engine(real, sixteen):
    e = real()
    e.sample(3, seed=8, plan=consistent_annealed(SIGMAS))
    for _ in range(5):
        assert torch.equal(e.sample(16, seed=3, plan=PLAN), sixteen)


def test_two_callers_at_once(real, sixteen):
    e, results = real(), {}

    def caller(name, first, seed):
        results[name] = [e.sample(8, seed, PLAN, first) for _ in range(3)]

    threads = [threading.Thread(target=caller, args=a) for a in (("a", 0, 3), ("b", 8, 3), ("c", 0, 4))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(x, sixteen[:8]) for x in results["a"])
    assert all(torch.equal(x, sixteen[8:]) for x in results["b"])
    assert not torch.equal(results["c"][0], sixteen[:8])


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"first_id": 1}, {"first_id": 2**32}, {"plan": annealed_langevin(SIGMAS, 2, 1.01e-3)}]
)
def test_control_what_must_differ(real, sixteen, change):
    x = real().sample(16, **({"seed": 3, "plan": PLAN} | change))
    assert all(not torch.equal(a, b) for a, b in zip(x, sixteen, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
def test_noise_does_not_depend_on_the_batch(batch):
    """With a score whose bits do not depend on the batch either, nor do the samples'."""
    ids = [*range(6), 2**40 + 1, 2**56 - 1]
    want = [x for _, x in engine(8).stream(ids, 2**64 - 1, PLAN)]
    got = [x for _, x in engine(batch).stream(ids, 2**64 - 1, PLAN)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_channels_last_draws_the_same_noise():
    def nhwc(x, level):
        return gaussian(x, level).contiguous(memory_format=torch.channels_last)

    e = Engine(gaussian, 4, sigmas=SIGMAS, shape=(3, 4, 5))
    other = Engine(nhwc, 4, sigmas=SIGMAS, shape=(3, 4, 5))
    other._slots.x = other._slots.x.to(memory_format=torch.channels_last)
    assert torch.equal(e.sample(6, plan=PLAN), other.sample(6, plan=PLAN))


@pytest.mark.parametrize("start, scale, shift", [("uniform", 1.0, 0.0), ("uniform", 16.0, -8.0), ("normal", 3.0, 0.5)])
def test_the_start_is_draw_zero(start, scale, shift):
    """One row that changes nothing: a sample is its own start."""
    plan = Plan([0], [1.0], [1], [0], [0], start=start, start_scale=scale, start_shift=shift)
    z = noise.fill((5, *SHAPE), np.full(5, 9), np.arange(2, 7), 0, kind=start)
    assert torch.equal(engine().sample(5, 9, plan, first_id=2), torch.from_numpy(z) * scale + shift)


@pytest.mark.parametrize("n, batch", [(0, 4), (1, 4), (4, 4), (9, 4), (8, 1)])
def test_counts(n, batch):
    calls = []

    def model(x, level):
        calls.append(len(x))
        return gaussian(x, level)

    e = engine(batch, model)
    e.sample(n, plan=PLAN)
    s = e.stats
    assert (s.steps, s.nfe, s.harvested, s.captures) == (math.ceil(n / batch) * PLAN.nfe, n * PLAN.nfe, n, 0)
    assert calls == [1, min(2, batch)] + [batch] * s.steps  # first one image, alone and beside another


def test_a_stream_reads_ids_as_slots_fall_free():
    taken = []

    def ids():
        for i in count():
            taken.append(i)
            yield i

    stream = engine(4).stream(ids(), plan=PLAN)
    assert not taken
    assert [next(stream)[0] for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    assert len(taken) <= 12
    stream.close()


def test_results_are_the_callers_own():
    e = engine()
    first = e.sample(4, plan=PLAN)
    kept, streamed = first.clone(), [x.clone() for _, x in e.stream(range(4), plan=PLAN)]
    first.zero_()
    assert torch.equal(e.sample(4, plan=PLAN), kept) and torch.equal(torch.stack(streamed), kept)
    kept.requires_grad_()  # not an inference tensor
    (kept * 2).sum().backward()


def test_the_model_is_called_without_gradients(net):
    seen = []

    def model(x, level):
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad():  # an energy model needs its own
            y = x.clone().requires_grad_()
            return torch.autograd.grad(-(y**2).sum() / 2, y)[0]

    with torch.enable_grad():
        x = engine(model=model).sample(1, plan=PLAN)
    assert not any(seen) and not x.requires_grad
