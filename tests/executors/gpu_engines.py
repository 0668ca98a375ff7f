"""What the tests of gpu share."""

import warnings

import pytest
import torch

from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.plans.schedule import geometric

SIGMAS = geometric(1, 0.1, 3)


PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)


SHAPE = (1, 16, 16)


@pytest.fixture(autouse=True)
def no_fallback():
    """A capture that fails and a batch that is halved are warnings: here they are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(running eager|out of memory)")
        yield


def net(ngf=32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN(SIGMAS, channels=1, ngf=ngf, divide_by_sigma=True, image_size=16).eval()


def difference(a, b):
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().cpu())
