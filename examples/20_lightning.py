"""Train a score network in your own Lightning run, with sample grids drawn from its averaged weights while it trains:

python examples/20_lightning.py mnist/     (the folder of MNIST's IDX files; needs the extra [train]; some minutes)
"""

import sys

import lightning.pytorch as pl

from sgm_engine import Engine, annealed_langevin, geometric
from sgm_engine.data.images import load_images
from sgm_engine.images import grid, save_png, to_uint8
from sgm_engine.models import NCSN
from sgm_engine.training.callbacks import EMA, SampleGrid
from sgm_engine.training.loader import ImageBatches
from sgm_engine.training.module import ScoreModule

images = load_images(sys.argv[1])  # uint8 [60000, 1, 28, 28]
network = NCSN(geometric(3, 0.01, 10), channels=1, ngf=16, divide_by_sigma=True)
plan = annealed_langevin(network.sigmas, 5, 4e-5, start="normal", start_scale=3.0, start_shift=0.13)

# An ordinary LightningModule and ordinary callbacks. The grids come from the average that EMA keeps, in place.
module = ScoreModule(network, objective="denoising", lr=2e-3, betas=(0.9, 0.99), warmup=50, decay=0.5, steps=600)
grids = SampleGrid(every=100, n=36, plan=plan, folder="grids")
trainer = pl.Trainer(max_steps=600, max_epochs=-1, gradient_clip_val=1000.0, callbacks=[EMA(0.99), grids])
trainer.fit(module, ImageBatches(images, batch=32))

x = Engine(module.network.eval(), batch=36).sample(36, plan=plan)  # the weights are the average's now
save_png("trained.png", grid(to_uint8(x)))
print("trained.png, and grids/*.png on the way there")
