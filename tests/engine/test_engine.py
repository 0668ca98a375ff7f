"""The engine: sample i is sample i, nothing is wasted or lost, and every bad call is answered in one clear line."""

import math
import threading
from itertools import count, pairwise

import numpy as np
import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.engine.loop import STRIDE
from sgm_engine.engine.progress import StepInfo
from sgm_engine.errors import Cancelled, EngineBusy, SampleDiverged
from sgm_engine.kernels import noise
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import Plan, annealed_langevin, consistent_annealed
from sgm_engine.plans.schedule import geometric

SIGMAS = geometric(1, 0.1, 3)
SHAPE = (1, 8, 8)
PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)
SIGMA2 = torch.tensor(SIGMAS, dtype=torch.float32) ** 2


def gaussian(x, level):
    """The exact score of data at 0: elementwise, so its bits do not depend on the batch."""
    return -x / SIGMA2[level][:, None, None, None]


def engine(batch=4, model=gaussian, **options):
    return Engine(model, batch, sigmas=SIGMAS, shape=SHAPE, **options)


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()


@pytest.fixture(scope="module", params=["eager", "native"])
def real(net, request):
    """Makes engines on a real network at compute batch 8."""
    return lambda: Engine(net, 8, executor=request.param)


@pytest.fixture(scope="module")
def sixteen(real):
    """Samples 0–15, the bytes that every other way of asking must give."""
    return real().sample(16, seed=3, plan=PLAN)


# -- sample i is sample i ----------------------------------------------------------------------------------------------


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


# -- nothing wasted ----------------------------------------------------------------------------------------------------


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


# -- callback, progress, cancel ----------------------------------------------------------------------------------------


def test_callback_sees_every_step():
    seen: list[StepInfo] = []
    states = []

    def callback(info):
        seen.append(info)
        states.append((info.x.clone(), info.denoised.clone()))

    x = engine(4).sample(6, seed=1, plan=PLAN, callback=callback)
    assert [info.step for info in seen] == list(range(1, 2 * PLAN.nfe + 1))
    for k, info in enumerate(seen):
        row = k % PLAN.nfe
        ids = [0, 1, 2, 3] if k < PLAN.nfe else [4, 5]
        assert info.sample_ids == ids and info.rows == [row] * len(ids)
        assert info.levels == [PLAN.level[row]] * len(ids) and info.sigmas == [PLAN.sigma[row]] * len(ids)
        assert states[k][1].abs().max() < 1e-6  # all data is at 0
    assert torch.equal(torch.cat([states[PLAN.nfe - 1][0], states[-1][0]]), x)
    assert torch.equal(x, engine(4).sample(6, seed=1, plan=PLAN))


def test_denoised_is_of_the_state_before_the_step(net):
    e, states = Engine(net, 2, executor="eager"), []
    e.sample(2, plan=PLAN, callback=lambda info: states.append((info.rows[0], info.x.clone(), info.denoised.clone())))
    for (_, before, _), (row, _, denoised) in pairwise(states):
        with torch.no_grad():
            score = net(before, torch.full((2,), int(PLAN.level[row])))
        torch.testing.assert_close(denoised, before + float(PLAN.sigma[row]) ** 2 * score)


def test_progress_counts_samples(capsys):
    engine().sample(9, plan=PLAN, progress=True)
    list(engine().stream(iter(range(3)), plan=PLAN, progress=True))
    text = capsys.readouterr().err
    assert "9/9" in text and "sample/s" in text and "3sample" in text


def test_cancel_from_a_callback_keeps_what_is_finished():
    e = engine(4)
    with pytest.raises(Cancelled, match="4 of 9 samples finished") as error:
        e.sample(9, 1, PLAN, first_id=20, callback=lambda info: info.step == PLAN.nfe + 2 and e.cancel())
    assert error.value.sample_ids == [20, 21, 22, 23]
    assert torch.equal(error.value.samples, engine(4).sample(4, 1, PLAN, 20))
    assert e.stats.steps == PLAN.nfe + 2
    assert torch.equal(e.sample(9, 1, PLAN), engine(4).sample(9, 1, PLAN))


def test_cancel_from_another_thread_stops_within_a_stride():
    running = threading.Event()

    def model(x, level):
        running.set()
        return gaussian(x, level)

    e = engine(4, model)
    thread = threading.Thread(target=lambda: (running.wait(), e.cancel()))
    thread.start()
    with pytest.raises(Cancelled, match="the stream was cancelled"):
        for _ in e.stream(count(), plan=annealed_langevin(SIGMAS, 10000, 1e-3)):
            pass
    thread.join()
    assert e.stats.harvested == 0


def test_cancel_too_late_or_for_nothing():
    e = engine(4)
    e.cancel()
    assert len(e.sample(2, plan=PLAN)) == 2
    x = e.sample(4, plan=PLAN, callback=lambda info: info.step == PLAN.nfe and e.cancel())
    assert len(x) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["model", "callback"])
def test_an_exception_leaves_the_engine_usable(error, where):
    armed = [True]

    def fail(*_):
        if armed[0]:
            raise error

    def model(x, level):
        if where == "model" and level.max() == 1:
            fail()
        return gaussian(x, level)

    e = engine(4, model)
    with pytest.raises(error):
        e.sample(9, 1, PLAN, callback=fail if where == "callback" else None)
    assert (e._slots.row >= e._slots.stop).all()  # idle on the device too
    armed[0] = False
    assert torch.equal(e.sample(9, 1, PLAN), engine(4).sample(9, 1, PLAN))


def test_a_stream_left_or_lost_frees_the_engine():
    e = engine(4)
    want = engine(4).sample(5, plan=PLAN)
    stream = e.stream(range(100), plan=PLAN)
    next(stream)
    with pytest.raises(EngineBusy, match="finish or close the stream"):
        e.sample(1, plan=PLAN)
    stream.close()
    assert torch.equal(e.sample(5, plan=PLAN), want)
    next(e.stream(range(100), plan=PLAN))  # dropped
    assert torch.equal(e.sample(5, plan=PLAN), want)


def test_ids_that_fail_midway_leave_the_engine_usable():
    e = engine(2)
    stream, got = e.stream(iter([0, 1, 2, -1, 4]), plan=PLAN), []
    with pytest.raises(ValueError, match=r"sample_ids must be at least 0 .* got -1"):
        for i, _ in stream:
            got.append(i)
    assert len(e.sample(3, plan=PLAN)) == 3


# -- divergence --------------------------------------------------------------------------------------------------------


def poisoned(slot, step, value, pixel=5):
    """The exact score, but ``value`` in one pixel of one slot at one network call."""
    calls = count()

    def model(x, level):
        score = gaussian(x, level)
        if len(x) == 4 and next(calls) == step:  # of the steps: one or two images are a question at the start
            score[slot].view(-1)[pixel] = value
        return score

    return model


@pytest.mark.parametrize("step", [0, 1, 3, 5, 6, 7, 9, 13])  # two rounds of 7 rows
@pytest.mark.parametrize("slot", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_named_and_the_others_are_unaffected(slot, step, value):
    clean = engine(4).sample(8, 2, PLAN, first_id=100)
    e = engine(4, poisoned(slot, step, value))
    e._tables.add(consistent_annealed(SIGMAS))  # the plan's rows do not begin at 0
    with pytest.raises(SampleDiverged) as error:
        e.sample(8, 2, PLAN, first_id=100)
    bad, row = slot + 4 * (step // PLAN.nfe), step % PLAN.nfe
    (divergence,) = error.value.divergences
    assert divergence == (100 + bad, row, PLAN.level[row], PLAN.sigma[row])
    assert f"sample {100 + bad} at row {row} (level {PLAN.level[row]}, sigma" in str(error.value)
    assert error.value.sample_ids == [100 + i for i in range(8) if i != bad]
    assert torch.equal(error.value.samples, clean[[i for i in range(8) if i != bad]])


def test_a_stream_yields_the_good_then_raises():
    got = []
    with pytest.raises(SampleDiverged, match="sample 1 at row 3") as error:
        for i, _ in engine(4, poisoned(1, 3, math.nan)).stream(range(9), plan=PLAN):
            got.append(i)
    assert got == [0, 2, 3, 4, 5, 6, 7, 8] and len(error.value.samples) == 0


def test_a_stream_can_report_divergence_as_it_goes():
    bad = []
    stream = engine(4, poisoned(1, 3, math.nan)).stream(range(9), plan=PLAN, on_diverged=bad.append)
    assert len(list(stream)) == 8 and [d.sample_id for d in bad] == [1]


def test_a_slot_recovers_for_its_next_sample():
    """NaN in a slot must not reach the sample that takes the slot over."""
    with pytest.raises(SampleDiverged) as error:
        engine(1, poisoned(0, 2, math.nan)).sample(3, plan=PLAN)
    assert error.value.sample_ids == [1, 2] and error.value.samples.isfinite().all()


# -- bad calls ---------------------------------------------------------------------------------------------------------

TEN = geometric(1, 0.01, 10)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda e: e.sample(-1), ValueError, "n must be at least 0, got -1"),
        (lambda e: e.sample(2.0), TypeError, "n must be an integer, got 2.0"),
        (lambda e: e.sample("3"), TypeError, "n must be an integer, got '3'"),
        (lambda e: e.sample(True), TypeError, "n must be an integer, got True"),
        (lambda e: e.sample(1, seed=1.5), TypeError, "seed must be an integer, got 1.5"),
        (lambda e: e.sample(1, seed=None), TypeError, "seed must be an integer, got None"),
        (lambda e: e.sample(1, seed=-1), ValueError, r"seed must be at least 0 and below 2\*\*64, got -1"),
        (lambda e: e.sample(1, seed=2**64), ValueError, r"seed must be at least 0 and below 2\*\*64"),
        (lambda e: e.sample(1, first_id=-1), ValueError, "first_id must be at least 0"),
        (lambda e: e.sample(1, first_id=2**56), ValueError, r"first_id .* below 2\*\*56"),
        (lambda e: e.sample(2, first_id=2**56 - 1), ValueError, r"first_id \+ n"),
        (lambda e: e.sample(1, plan=[1]), TypeError, "plan must be a Plan .* got list"),
        (lambda e: e.sample(1, callback=3), TypeError, "callback must be callable, got int"),
        (
            lambda e: e.sample(1, plan=annealed_langevin(TEN, 1)),
            ValueError,
            r"plan uses level 9, but the model has 3 sigmas",
        ),
        (
            lambda e: e.sample(1, plan=Plan([1], [1.0], [1], [0], [0])),
            ValueError,
            "plan row 0 has sigma 1 at level 1, where the model has 0.316",
        ),
        (
            lambda e: e.sample(1, plan=Plan([0], [1.01], [1], [0], [0])),  # of another model
            ValueError,
            "plan row 0 has sigma 1.01 at level 0, where the model has 1",
        ),
        (
            lambda e: e.sample(1, plan=Plan([0], [1.0], [1], [0], [0], [0.5])),
            ValueError,
            "uses previous, which no row before it stores",
        ),
        (lambda e: list(e.stream([1.5])), TypeError, "sample_ids must be an integer, got 1.5"),
        (lambda e: e.stream([0], seed="x"), TypeError, "seed must be an integer"),
        (lambda e: e.stream([0], plan=annealed_langevin), TypeError, "plan must be a Plan"),
        (lambda e: engine(0), ValueError, r"batch must be at least 1 and below 2\*\*31, got 0"),
        (lambda e: engine(2.5), TypeError, "batch must be an integer, got 2.5"),
        (lambda e: engine(model=3), TypeError, "model must be callable"),
        (lambda e: Engine(gaussian, shape=SHAPE), ValueError, r"sigmas: the model has no .sigmas, so pass sigmas="),
        (
            lambda e: Engine(gaussian, sigmas=SIGMAS),
            ValueError,
            r"shape: the model has no .shape, so pass shape=\(C, H, W\)",
        ),
        (
            lambda e: Engine(gaussian, sigmas=SIGMAS, shape=(8, 8)),
            ValueError,
            r"shape must be \(C, H, W\), got \(8, 8\)",
        ),
        (lambda e: Engine(gaussian, sigmas=SIGMAS, shape=(1, 0, 8)), ValueError, "shape must be at least 1, got 0"),
        (lambda e: Engine(gaussian, sigmas=SIGMAS[::-1], shape=SHAPE), ValueError, "sigmas must descend"),
        (lambda e: engine(precision="half"), ValueError, "precision must be one of"),
        (lambda e: engine(executor="jit"), ValueError, "executor must be one of"),
        (lambda e: engine(device="nowhere"), ValueError, "device must be 'cpu', 'cuda' .*, got 'nowhere'"),
        (lambda e: engine(device="meta"), ValueError, "device must be 'cpu' or 'cuda', got 'meta'"),
        (lambda e: Engine(gaussian, sigmas=SIGMAS, shape=8), TypeError, r"shape must be \(C, H, W\), got 8"),
    ],
)
def test_bad_calls(call, error, says):
    e = engine()
    with pytest.raises(error, match=says) as info:
        call(e)
    assert "\n" not in str(info.value) or isinstance(info.value, RuntimeError)
    assert e.stats.steps == 0 and len(e.sample(1, plan=PLAN)) == 1


def test_a_model_stays_as_it_is_when_its_engine_is_refused():
    """On the meta device, module.to would drop its weights; other sigmas than its own would name its levels wrongly."""
    net = NCSN([1.0, 0.3, 0.1], channels=1, ngf=4, divide_by_sigma=True, image_size=8)
    before = net.begin_conv.weight.clone()
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'meta'"):
        Engine(net, 1, "meta")
    for sigmas in ([1.0, 0.3], [1.0, 0.5, 0.1]):
        with pytest.raises(ValueError, match=r"the model has 3 of its own, 1 to 0\.1, and these differ"):
            Engine(net, 1, sigmas=sigmas)
    assert net.begin_conv.weight.equal(before)
    assert len(Engine(net, 1, sigmas=[1, 0.3, 0.1]).sigmas) == 3
    with pytest.raises(ValueError, match="on the meta device, without values"):
        Engine(net.to("meta"), 1)


def test_default_plan():
    assert engine().default_plan == annealed_langevin(SIGMAS)
    with pytest.raises(ValueError, match="must diverge"):
        Engine(gaussian, sigmas=[1e-3, 1e-4], shape=SHAPE).sample(1)


def test_numpy_integers_are_integers():
    assert torch.equal(engine().sample(np.int64(2), np.uint64(7), PLAN), engine().sample(2, 7, PLAN))


def test_the_stride_divides_no_plan():
    """Requests longer than a stride end where they should."""
    plan = annealed_langevin(SIGMAS, STRIDE, 1e-3)
    e = engine(4)
    assert len(e.sample(5, plan=plan)) == 5 and e.stats.steps == 2 * plan.nfe
