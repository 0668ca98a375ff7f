"""Two users of one running batch, with plans of their own: python examples/service.py"""

import torch

from sgm_engine import Engine, SamplerService, annealed_langevin, load_bundled
from sgm_engine.images import grid, save_png, to_uint8

model, _ = load_bundled()
plans = [annealed_langevin(model.sigmas, steps) for steps in (6, 8)]
with SamplerService(Engine(model, batch=4)) as service:  # submit from as many threads as you like
    futures = [service.submit(2, seed=7, plan=plan) for plan in plans]
    rows = [future.result() for future in futures]  # each the same bits as engine.sample(2, 7, plan)
    print(service.metrics())
save_png("service.png", grid(to_uint8(torch.cat(rows)), columns=2))
