"""What the two terms of the loss are good for: cross entropy alone, squared error alone, both. Points in the plane.

    python -m sgm_engine.cdm.ablation --out ablation

writes table.md there. The exact classifier of the mixture is known, so every column has a truth to be compared with.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from sgm_engine.cdm.classes import NoiseClasses, ddpm
from sgm_engine.cdm.model import CDM
from sgm_engine.cdm.networks import MLP
from sgm_engine.cdm.objective import cdm, parts
from sgm_engine.training.keys import Key
from sgm_engine.training.toy import TRIPLE

CLASSES = ddpm(50, 0.002, 0.4)
STEPS, BATCH, SEEDS = 2500, 256, 3
LOSSES = {"CE only": (1.0, 0.0), "MSE only": (0.0, 1.0), "0.001·CE + MSE": (0.001, 1.0), "CE + MSE": (1.0, 1.0)}


def train(
    network: MLP,
    classes: NoiseClasses,
    steps: int = STEPS,
    batch: int = BATCH,
    weights: tuple[float, float] = (1.0, 1.0),
    lr: float = 5e-3,
    seed: int = 0,
) -> CDM:
    """``network`` trained on the mixture by ``weights`` of cross entropy and squared error, lr falling to 0."""
    model, count = CDM(network, classes), classes.levels + 2
    adam = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: 1 - k / steps)
    for k in range(steps):
        key = Key(seed, torch.arange(k * batch, (k + 1) * batch))
        t = (key.uniform(torch.empty(batch, 1), 2)[:, 0] * count).long()
        loss = cdm(model, TRIPLE.sample(key).float(), t, key.after(3), ce_weight=weights[0], mse_weight=weights[1])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return model.eval()
