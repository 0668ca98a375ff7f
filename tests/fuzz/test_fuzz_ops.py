"""Some of the fuzzing of the ops, with fixed seeds and without sanitizers; and that it notices."""

import pytest
import torch

from sgm_engine.kernels import ops, reference
from tests.fuzz.ops import Calls


def test_calls_are_refused_or_right():
    accepted = sum(Calls(seed).one() for seed in range(300))
    assert 80 < accepted < 220


@pytest.mark.parametrize("planted", ["noise", "langevin_update", "noise_conditioned_norm"])
def test_other_values_are_noticed(planted, monkeypatch):
    own = getattr(reference, planted)
    monkeypatch.setattr(reference, planted, lambda *args, **kwargs: _off(own(*args, **kwargs)))
    with pytest.raises(AssertionError):
        for seed in range(200):
            Calls(seed).one()


def _off(y):
    return tuple(map(_off, y)) if isinstance(y, tuple) else y * 1.01


def test_an_argument_that_shares_memory_is_noticed(monkeypatch):
    """Without the check of overlaps, an update reads what it has written."""
    monkeypatch.setattr(ops, "check_apart", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError):
        for seed in range(3000):
            Calls(seed).one()


@pytest.mark.parametrize("name", ["x", "score", "coef", "draw", "row", "stop", "seed", "sample_id", "bad_row"])
def test_none_for_a_tensor(name):
    x, i = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    arguments = dict(x=x, score=x.clone(), coef=torch.zeros(1, 4), draw=i.int(), row=i.clone(), stop=i.clone())
    arguments |= dict(seed=i.clone(), sample_id=i.clone(), bad_row=i.clone())
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
        ops.langevin_update_(**(arguments | {name: None}))
