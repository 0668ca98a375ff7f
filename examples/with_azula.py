"""Annealed Langevin dynamics for azula's denoisers: python examples/with_azula.py"""

import torch
from azula.denoise import KarrasDenoiser
from azula.noise import VPSchedule

from sgm_engine.integrations.azula import ALDSampler


class Backbone(torch.nn.Conv2d):  # stands for your trained network
    def forward(self, x, t):
        return super().forward(x).tanh()


sampler = ALDSampler(KarrasDenoiser(Backbone(3, 3, 3, padding=1), VPSchedule()), steps=64, seed=0)
print(sampler(sampler.init((4, 3, 16, 16))).std())
