"""Annealed Langevin dynamics as one more of k-diffusion's samplers: python examples/with_k_diffusion.py"""

import torch

from sgm_engine import load_bundled
from sgm_engine.images import grid, save_png, to_uint8
from sgm_engine.integrations.deepinv import Denoiser
from sgm_engine.integrations.k_diffusion import sample_ald

model = Denoiser(load_bundled()[0])  # or any of k-diffusion's wrappers: model(x, sigma) → denoised
sigmas = torch.tensor([*model.sigmas, 0.0])
x = sample_ald(model, torch.randn(4, 1, 28, 28) * sigmas[0], sigmas, steps_per_level=8, step=0.2)
save_png("with_k_diffusion.png", grid(to_uint8(x)))
