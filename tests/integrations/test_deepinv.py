"""The deepinv adapter against deepinv; seeds from generators."""

import pytest
import torch

from bench.stand_ins import deepinv as real_deepinv
from sgm_engine.integrations import deepinv
from sgm_engine.integrations.foreign import seeds
from tests.integrations.adapters import (
    net,  # noqa: F401 - fixtures
)


def test_deepinv_score_prior_gives_the_networks_score(net):
    real = real_deepinv()
    prior = real.optim.ScorePrior(deepinv.Denoiser(net))
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(prior.score(x, 0.5), net(x, torch.full((3,), 1)), rtol=1e-4, atol=1e-4)


def test_deepinv_plug_and_play_and_langevin(net):
    real = real_deepinv()
    physics = real.physics.Denoising(real.physics.GaussianNoise(0.1))
    y = physics(torch.rand(2, 1, 8, 8))
    denoiser = deepinv.Denoiser(net)
    x = real.optim.PGD(
        data_fidelity=real.optim.L2(), prior=real.optim.PnP(denoiser), stepsize=0.5, sigma_denoiser=0.2, max_iter=3
    )(y, physics)
    assert x.shape == y.shape and x.isfinite().all() and not torch.equal(x, y)


def test_deepinv_denoiser(net):
    denoiser, x = deepinv.Denoiser(net), torch.rand(3, 1, 8, 8)
    sigma = torch.tensor([1.0, 0.26, 0.125])
    with torch.no_grad():
        native = denoiser(x, sigma)
        plain = x + sigma.reshape(-1, 1, 1, 1) ** 2 * net(x, torch.tensor([0, 2, 3]))
        torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
        assert denoiser._fast.network is not None
        torch.testing.assert_close(denoiser(x, 0.5), denoiser(x, sigma.new_full((3,), 0.5)), rtol=0, atol=0)
    image = x.clone().requires_grad_()
    denoiser(image, 0.5).square().sum().backward()
    assert image.grad.abs().sum() > 0 and net.begin_conv.weight.grad is not None
    net.zero_grad()


def test_deepinv_denoiser_follows_the_weights(net):
    import copy

    mine = copy.deepcopy(net)
    denoiser, x = deepinv.Denoiser(mine), torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        before = denoiser(x, 0.5)
        mine.begin_conv.weight.mul_(1.5)
        assert not torch.equal(denoiser(x, 0.5), before)


def test_deepinv_denoiser_looks_at_a_network_once(monkeypatch):
    """Traced for one size of images; again when the model has become another; never stale."""
    from tests.mutations import LEVELS, SHAPE, Model

    made, real = [], deepinv.NativeNetwork
    monkeypatch.setattr(deepinv, "NativeNetwork", lambda *a, **b: made.append(1) or real(*a, **b))
    model = Model(0, "open").eval()
    denoiser, x = deepinv.Denoiser(model), torch.rand(2, *SHAPE)

    def right():
        want = x + LEVELS[1] ** 2 * model(x, torch.tensor([1, 1]))
        torch.testing.assert_close(denoiser(x, LEVELS[1]), want, rtol=1e-4, atol=1e-4)
        return len(made)

    with torch.no_grad():
        assert [right(), right(), right()] == [1, 1, 1]
        model.config.scale = 0.0
        assert right() == 2
        model.last.register_forward_hook(lambda m, a, out: out * out.flip(-1))  # has no layer
        assert [right(), right()] == [3, 3] and denoiser._fast.network is None
        monkeypatch.setattr(deepinv.Observed, "changed", lambda self: None)
        model.last._forward_hooks.clear()
        other = deepinv.Denoiser(model)
        other(x, LEVELS[1])
        model.gain, other._fast.due, denoiser = 3.0, 0, other  # what no record sees is found when it is compared next
        assert [right(), right()] == [5, 5]


@pytest.mark.parametrize("sigma", [2.0, 0.05, 0.0, float("nan"), torch.tensor([0.5, 9.0])])
def test_deepinv_sigma_out_of_range(net, sigma):
    with pytest.raises(ValueError, match=r"trained from 0\.125 to 1"):
        deepinv.Denoiser(net)(torch.rand(2, 1, 8, 8), sigma)


def test_deepinv_bad_arguments(net):
    with pytest.raises(ValueError, match="pass sigmas"):
        deepinv.Denoiser(lambda x, level: x)
    with pytest.raises(ValueError, match="one for each of 2 images, got 3"):
        deepinv.Denoiser(net)(torch.rand(2, 1, 8, 8), [0.5, 0.5, 0.5])


def test_seeds_from_generators():
    def g(seed):
        return torch.Generator().manual_seed(seed)

    assert seeds(None, 2, g(1)) == seeds(None, 5, g(1)) != seeds(None, 2, g(2))
    assert seeds(None, 2, [g(1), g(2)]) == [seeds(None, 1, g(1)), seeds(None, 1, g(2))]
    one = g(1)
    assert seeds(None, 1, one) != seeds(None, 1, one), "a generator moves on"
    assert seeds(7, 3) == 7 and seeds((1, 2), 2) == [1, 2]
    with pytest.raises(ValueError, match="list of 3, got 2"):
        seeds(None, 3, [g(1), g(2)])
