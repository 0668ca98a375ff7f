"""A small PotentialNet of small digits, for the tests of it."""

import numpy as np
import torch

from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.training.cdm_fits import fit_base

SMALL = {"channels": 1, "image_size": 8, "width": 8, "multipliers": (1, 2), "blocks": 1, "potentials": 3,
         "mixing": (4, 8), "schedule": "vp_geometric", "levels": 12,
         "schedule_options": {"sigma_max": 10.0, "sigma_min": 0.05}}  # fmt: skip


def digits(n=200, seed=0, size=8, channels=1):
    """Bars of some width and place, uint8 [n, channels, size, size]."""
    generator = np.random.default_rng(seed)
    images = np.zeros((n, 1, size, size), np.uint8)
    for image, (at, width, value, turned) in zip(
        images, generator.integers(0, (size - 2, 3, 100, 2), (n, 4)), strict=True
    ):
        image[0, :, at : at + width + 1] = 150 + value
        image[0] = image[0].T if turned else image[0]
    images = np.repeat(images, channels, 1)
    return np.clip(images + generator.integers(0, 20, images.shape), 0, 255).astype(np.uint8)


def potential(seed=0, **changes):
    """Every weight matters; its base is fitted to ``digits``."""
    config = CDMConfig(**SMALL | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = config.build().eval()
        torch.nn.init.normal_(model.classifier.head.weight, 0, 0.5)
        for name, p in model.named_parameters():
            if "place" in name or p.dim() == 1:
                torch.nn.init.normal_(p, 0, 0.2)
    fit_base(model, digits(size=config.image_size, channels=config.channels))
    return model
