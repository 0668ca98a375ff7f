"""A score network as deepinv's prior: digits restored from pixels lost and noise: python examples/with_deepinv.py"""

import deepinv as dinv

from sgm_engine import Engine, annealed_langevin, load_bundled
from sgm_engine.integrations.deepinv import Denoiser

model, _ = load_bundled()
clean = Engine(model, batch=2).sample(2, plan=annealed_langevin(model.sigmas, 8)).clamp(0, 1)
physics = dinv.physics.Inpainting((1, 28, 28), mask=0.6, noise_model=dinv.physics.GaussianNoise(0.1))
y = physics(clean)
prior = dinv.optim.PnP(Denoiser(model))
restore = dinv.optim.PGD(dinv.optim.L2(), prior=prior, stepsize=1.0, sigma_denoiser=0.2, max_iter=20)
psnr = dinv.metric.PSNR()
print(f"PSNR measured {psnr(y, clean).mean():.1f} dB, restored {psnr(restore(y, physics), clean).mean():.1f} dB")
