"""What the tests of engine share."""

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin
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
