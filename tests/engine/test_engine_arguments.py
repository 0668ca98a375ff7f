"""Every bad call of an engine is answered in one clear line, and changes nothing."""

import numpy as np
import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.engine.loop import STRIDE
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import Plan, annealed_langevin
from sgm_engine.plans.schedule import geometric
from tests.engine.engines import (
    PLAN,
    SHAPE,
    SIGMAS,
    engine,
    gaussian,
    net,  # noqa: F401 - fixtures
)

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
    assert Engine(gaussian, sigmas=[1e-3, 1e-4], shape=SHAPE).default_plan.metadata["step_lr"] == 0.2 * 1e-4**2


def test_numpy_integers_are_integers():
    assert torch.equal(engine().sample(np.int64(2), np.uint64(7), PLAN), engine().sample(2, 7, PLAN))


def test_the_stride_divides_no_plan():
    """Requests longer than a stride end where they should."""
    plan = annealed_langevin(SIGMAS, STRIDE, 1e-3)
    e = engine(4)
    assert len(e.sample(5, plan=plan)) == 5 and e.stats.steps == 2 * plan.nfe
