"""What EDM's and EDM2's generate_images call, with a network of another kind: python examples/with_edm.py"""

import torch

from sgm_engine import load_bundled
from sgm_engine.images import grid, save_png, to_uint8
from sgm_engine.integrations import deepinv, edm

net = deepinv.Denoiser(load_bundled()[0])  # stands for a network of EDM: net(x, sigma, labels) → denoised
latents = torch.randn(4, 1, 28, 28)
images = edm.sampler_fn(net, latents, num_steps=12, sigma_min=0.01, sigma_max=5, steps_per_level=8, step=0.2)
save_png("with_edm.png", grid(to_uint8(images)))
