"""What happens while an engine draws: callbacks, cancellation, errors, divergence; nothing is lost."""

import math
import threading
from itertools import count, pairwise

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.engine.loop import STRIDE
from sgm_engine.engine.progress import StepInfo
from sgm_engine.errors import Cancelled, EngineBusy, SampleDiverged
from sgm_engine.plans.plan import annealed_langevin, consistent_annealed
from tests.engine.engines import (
    PLAN,
    SIGMAS,
    engine,
    gaussian,
    net,  # noqa: F401 - fixtures
)


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
    engine().sample(9, plan=PLAN, progress="bar")
    list(engine().stream(iter(range(3)), plan=PLAN, progress="bar"))
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
    running, cancelled, calls = threading.Event(), threading.Event(), count()

    def model(x, level):
        if next(calls) == 50:
            running.set()
            assert cancelled.wait(30)
        return gaussian(x, level)

    e = engine(4, model)
    thread = threading.Thread(target=lambda: (running.wait(), e.cancel(), cancelled.set()))
    thread.start()
    with pytest.raises(Cancelled, match="the stream was cancelled"):
        for _ in e.stream(count(), plan=annealed_langevin(SIGMAS, 10000, 1e-3)):
            pass
    thread.join()
    assert e.stats.harvested == 0 and STRIDE < e.stats.steps <= 50 + STRIDE


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


def poisoned(slot, step, value, pixel=5, batch=4):
    """The exact score, but ``value`` in one pixel of one slot at one network call."""
    calls = count()

    def model(x, level):
        score = gaussian(x, level)
        if len(x) == batch and next(calls) == step:  # of the steps: one or two images are a question at the start
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
        engine(1, poisoned(0, 4, math.nan, batch=1)).sample(3, plan=PLAN)  # two questions, then row 2
    assert error.value.sample_ids == [1, 2] and error.value.samples.isfinite().all()
