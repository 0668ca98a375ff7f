"""EDM2's network pickles: to the network of its paper, to Heun's plan, and what is refused by name."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from sgm_engine import load_checkpoint
from tests.edm2_reference import Reference
from tests.family_files import TINY_EDM2, edm2_network, edm2_pickle, refused, relative

NAMED = {k: v for k, v in TINY_EDM2.items() if k not in ("img_resolution", "img_channels", "label_dim")}


@pytest.mark.parametrize("named, unnamed, half", [(TINY_EDM2, (), False), (NAMED, (16, 3, 5), True)])
@torch.no_grad()
def test_edm2_pickles(tmp_path, named, unnamed, half):
    """D of the paper from our score in other units; arguments with their names or without, weights of 32 or 16 bits."""
    network = edm2_network()
    network = network.half() if half else network
    path = edm2_pickle(tmp_path / "edm2-img64-s-0.100.pkl", network, named | {"use_fp16": True}, unnamed)
    model = load_checkpoint(path, class_labels=2)
    assert model.averaged and model.plan["name"] == "heun" and len(model.sigmas) == 32
    assert model.config.plan["nfe"] == 63 and model.config.family == "EDM2 UNet, Precond"
    y = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    reference = Reference(network.state_dict(), 16)
    for sigma in (0.05, 3.0):
        total = sigma**2 + 0.25
        told = torch.tensor([np.log(sigma) / 4])
        found = reference(y / total**0.5, told, one_hot(torch.tensor([2]), 5))
        expected = 0.25 / total * y + sigma * 0.5 / total**0.5 * found
        x = ((y + 1) / 2).float()
        score = model.at_sigmas([sigma / 2])(x, torch.tensor([0]))
        denoised = 2 * (x.double() + (sigma / 2) ** 2 * score.double()) - 1
        assert relative(denoised, expected) < 5e-6


def test_what_is_not_known_is_refused_by_name(tmp_path):
    network, path = edm2_network(), tmp_path / "n.pkl"
    assert "draws latents, which its StabilityVAEEncoder decodes" in refused(
        edm2_pickle(path, network, TINY_EDM2, encoder="StabilityVAEEncoder")
    )
    assert load_checkpoint(edm2_pickle(path, network, TINY_EDM2, encoder=None)).shape == (3, 16, 16)
    assert "holds a EDMPrecond around a 'UNet'" in refused(edm2_pickle(path, network, TINY_EDM2, precond="EDMPrecond"))
    assert "arguments without names" in refused(edm2_pickle(path, network, NAMED, (16, 3, 5, 32)))
    assert "without img_resolution or img_channels" in refused(edm2_pickle(path, network, NAMED))
    assert "does not say with which arguments" in refused(edm2_pickle(path, network, {}))
    assert "takes no mlp_width" in refused(edm2_pickle(path, network, TINY_EDM2 | {"mlp_width": 4}))
    assert "resample_filter must be (1, 1)" in refused(
        edm2_pickle(path, network, TINY_EDM2 | {"resample_filter": [1, 3, 3, 1]})
    )
    assert "of shape [" in refused(edm2_pickle(path, network, TINY_EDM2 | {"label_dim": 4}))
    network.emb_fourier.phases /= 6.3
    assert "where radians up to 2π belong" in refused(edm2_pickle(path, network, TINY_EDM2))
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    assert "holds an EDM2 network's tensors alone" in refused(tmp_path / "bare.pt")
