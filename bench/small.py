"""Small networks of every family, random weights: what bench.workloads times and bench.instructions counts.

Heavy imports are inside functions: some workloads are programs that must not pay for them.
"""

from __future__ import annotations

import itertools

SIGMAS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def ncsn(ngf: int = 32, size: int = 28, channels: int = 1, version: int = 1):
    from sgm_engine import models

    kind = {1: models.NCSN, 2: models.NCSNv2}[version]
    return kind(SIGMAS, channels=channels, ngf=ngf, image_size=size)


def unet2d():
    from bench.families import Told
    from sgm_engine.models.unet2d import UNet2D

    down, up = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    sizes = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64, 64)}
    blocks = {"down_block_types": down, "up_block_types": up, "layers_per_block": 2, "norm_num_groups": 8}
    return Told(UNet2D(**sizes, **blocks), times(), (1, 28, 28))


def times():
    import torch

    return torch.linspace(900, 100, len(SIGMAS))


def ddpmpp():
    from bench.families import Told
    from sgm_engine.models.score_sde import NCSNpp

    return Told(NCSNpp(32, (1, 2), 1, (16,), 32), times(), (3, 32, 32))


def cdm():
    import torch

    from sgm_engine.models.cdm import CDMConfig

    sizes = {"channels": 1, "image_size": 16, "width": 32, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
    model = CDMConfig(**sizes, schedule="uniform", levels=30).build()
    torch.nn.init.normal_(model.classifier.head.weight, std=0.01)
    return model


def mlp():
    from sgm_engine.training.toy import ScoreMLP

    return ScoreMLP(SIGMAS, dim=64, width=512)


def layers(channels: int = 128, size: int = 32):
    """3×3 convolutions and little else."""
    import torch
    from torch import nn

    class Layers(nn.Module):
        shape = (1, size, size)

        def __init__(self):
            super().__init__()
            self.register_buffer("sigmas", torch.tensor(SIGMAS))
            widths = (1, *[channels] * 4, 1)
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))

        def forward(self, x, level):
            for conv in self.convs[:-1]:
                x = conv(x).relu()
            return self.convs[-1](x)

    return Layers()
