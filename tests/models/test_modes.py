"""Whatever is made of a module, each of its parts stays in the mode that it was in."""

import pytest
import torch
from torch import nn

from sgm_engine.engine.engine import Engine
from sgm_engine.models.guidance import classifier_free, posterior, preconditioned, with_drift
from sgm_engine.models.inverse import LinearOperator
from sgm_engine.models.score_model import as_score
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.training.callbacks import evaluating


class Mixed(nn.Module):
    """In training mode, with a frozen BatchNorm; or in evaluation mode, with a dropout that draws (Monte Carlo)."""

    sigmas, shape = (1.0, 0.1), (1, 4, 4)

    def __init__(self, training):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.5)
        self.train(training)
        self.norm.eval()
        self.drop.train()

    def forward(self, x, level):
        return self.norm(self.conv(x))


def identity():
    return LinearOperator(lambda x: x, Mixed.shape, lambda x: x)


def refused(call, *args):
    with pytest.raises(ValueError, match="in training mode"):
        call(*args)


WRAPPERS = {
    "as_score": as_score,
    "with_drift": lambda m: with_drift(m, lambda x, sigma: -x),
    "classifier_free": lambda m: classifier_free(m, m, 2.0),
    "posterior": lambda m: posterior(m, identity(), torch.zeros(Mixed.shape)),
    "preconditioned": lambda m: preconditioned(m, identity()),
    "Engine": lambda m: Engine(m, 2, executor="eager"),
    "a request that is refused": lambda m: refused(Engine(m, 2, executor="eager").sample, 1),
    "accelerate": lambda m: refused(accelerate, m),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_modes_are_the_users(name, training):
    model = Mixed(training)
    before = [part.training for part in model.modules()]
    made = WRAPPERS[name](model)
    assert [part.training for part in model.modules()] == before
    if isinstance(made, nn.Module):
        assert made.training == training


def test_a_grid_gives_every_mode_back():
    model = Mixed(True)
    before = [part.training for part in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == before
