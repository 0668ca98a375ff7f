"""The EDM adapter: both programs' calls, seeds, levels, guidance."""

import pytest
import torch

from sgm_engine.integrations import edm
from sgm_engine.plans.plan import ddim
from tests.integrations.adapters import (
    SHAPE,
    Blend,
    net,  # noqa: F401 - fixtures
)


class OneGeneratorEach:
    """What EDM's programs pass: noise of each sample from its own generator."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def randn(self, size):
        return torch.stack([torch.randn(size[1:], generator=g) for g in self.generators])

    def randn_like(self, x):
        return self.randn(x.shape)


def edm_images(numbers, net=None, labels=None, **options):
    each = OneGeneratorEach(numbers)
    latents = each.randn((len(numbers), *SHAPE))
    return edm.sampler_fn(net or Blend(), latents, labels, randn_like=each.randn_like, num_steps=5, **options)


def test_edm_a_seed_is_an_image():
    together = edm_images([3, 4, 5])
    assert torch.equal(edm_images([4])[0], together[1]) and torch.equal(edm_images([5, 3])[1], together[0])
    assert not torch.equal(together[0], together[1])


def test_edm2_calls_with_other_names():
    labels, net, guide = torch.tensor([0.3, -0.2]), Blend(), Blend()
    with torch.no_grad():
        guide.mean.fill_(-1.0)
    each = OneGeneratorEach([1, 2])
    noise = each.randn((2, *SHAPE))
    got = edm.sampler_fn(
        net=net, noise=noise, labels=labels, gnet=guide, guidance=1.5, randn_like=each.randn_like, num_steps=5
    )

    def guided(x, sigma, labels=None):
        return guide(x, sigma, labels) + 1.5 * (net(x, sigma, labels) - guide(x, sigma, labels))

    torch.testing.assert_close(got, edm_images([1, 2], guided, labels), rtol=1e-4, atol=1e-5)


def test_edm_euler_and_schedule():
    """plan=ddim is the deterministic sampler of EDM without its second-order correction; float64 like its latents."""
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    got = edm.sampler_fn(Blend(), latents, num_steps=8, sigma_max=20, plan=ddim)
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64)
    t = (20 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 20 ** (1 / 7))) ** 7
    x = latents * t[0]
    for now, after in zip(t, [*t[1:], 0], strict=True):
        x = x + (after - now) * (x - Blend()(x, now)) / now
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, x.detach(), rtol=1e-4, atol=1e-4)


def test_edm_sigmas_are_the_networks():
    class Rounded(Blend):
        sigma_min, sigma_max = 0.05, 3.0

        def round_sigma(self, sigma):
            return torch.as_tensor(sigma, dtype=torch.float32).mul(100).round() / 100

    seen = []
    net = Rounded()
    net.register_forward_pre_hook(lambda _, args: seen.append(round(float(args[1][0]), 6)))
    edm.sampler_fn(net, torch.zeros(1, *SHAPE), num_steps=4, plan=ddim)
    assert seen[0] == 3.0 and seen[-1] == 0.05 and all(round(s * 100, 4) == round(s * 100) for s in seen)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(), "latents .EDM. or noise"),
        (dict(latents=torch.zeros(1, *SHAPE), noise=torch.zeros(1, *SHAPE)), "pass one of them"),
        (dict(latents=torch.zeros(1, *SHAPE), class_labels=1, labels=1), "class_labels"),
        (dict(latents=torch.zeros(1, *SHAPE), guidance=2.0), "needs gnet"),
        (dict(latents=torch.zeros(1, *SHAPE), randn_like=torch.zeros_like), "randn_like"),
    ],
)
def test_edm_bad_calls(arguments, says):
    with pytest.raises(ValueError, match=says):
        edm.sampler_fn(Blend(), **arguments)
