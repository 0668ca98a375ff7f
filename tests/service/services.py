"""What the tests of service share."""

import threading

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.plans.plan import annealed_langevin

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
    assert not [t for t in threading.enumerate() if t.name.startswith("SamplerService")]
