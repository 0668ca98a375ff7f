"""EDM2's network against the paper's equations in float64, and what those equations promise."""

import pytest
import torch
from torch.nn.functional import one_hot

from sgm_engine.models.edm2_unet import EDM2UNet, normalised
from tests.edm2_reference import Reference
from tests.family_files import TINY_EDM2, edm2_network, relative

X, TOLD = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([-1.5, 0.1, 1.1])


@pytest.mark.parametrize("labels", [None, [4, 0, 2]])
@pytest.mark.parametrize("changed", [{}, {"label_dim": 0, "channel_mult": (1, 1, 2), "num_blocks": 2}])
@torch.no_grad()
def test_the_network_is_that_of_the_paper(labels, changed):
    network = edm2_network(**changed)
    labels = one_hot(torch.tensor(labels), 5) if labels and not changed else None
    expected = Reference(network.state_dict(), 16)(X.double(), TOLD.double(), labels)
    assert relative(network(X, TOLD, labels), expected) < 2e-6
    assert relative(network.double()(X.double(), TOLD.double(), labels), expected) < 1e-13


@torch.no_grad()
def test_large_activations_are_clamped():
    network = edm2_network(clip_act=0.5)
    seen = []
    for block in [*network.enc.values(), *network.dec.values()][1:]:
        block.register_forward_hook(lambda _, __, out: seen.append(out.abs().max().item()))
    network(X, TOLD)
    assert seen and max(seen) == 0.5


@torch.no_grad()
def test_magnitudes_are_kept():
    """Every block's output has the root mean square 1 that its input has, within what so few channels allow."""
    torch.manual_seed(0)
    network = EDM2UNet(**TINY_EDM2 | {"model_channels": 64}).eval()  # gains of 0, as before training
    seen = []
    for block in [*network.enc.values(), *network.dec.values()]:
        block.register_forward_hook(lambda _, __, out: seen.append(out.square().mean().sqrt().item()))
    network(torch.randn(4, 3, 16, 16), torch.randn(4))
    assert len(seen) == 11 and all(0.8 < rms < 1.25 for rms in seen)


def test_training_normalises_the_weights_that_it_stores():
    network = edm2_network().train()
    weights = {n: p for n, p in network.named_parameters() if p.dim() > 1}
    before = {n: p.detach().clone() for n, p in weights.items()}
    network(X, TOLD).square().mean().backward()
    assert not network.emb_label.weight.grad.any()  # no class was given
    for name, parameter in weights.items():
        rows = parameter.detach().flatten(1)
        assert torch.equal(parameter.detach(), normalised(before[name], tuple(range(1, parameter.dim()))))
        assert torch.allclose(rows.square().mean(1), torch.ones(len(rows)), atol=1e-3)
        # What is normalised has a gradient that is orthogonal to it.
        along = (parameter.grad.flatten(1) * rows).sum(1).abs()
        assert (along <= 1e-3 * parameter.grad.flatten(1).norm(dim=1) * rows.norm(dim=1) + 1e-7).all(), name


def test_another_filter_is_refused():
    with pytest.raises(ValueError, match=r"resample_filter must be \(1, 1\), got \(1, 3, 3, 1\)"):
        EDM2UNet(**TINY_EDM2, resample_filter=[1, 3, 3, 1])
