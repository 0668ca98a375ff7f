"""Annealed Langevin dynamics on its way (NCSN, figure 4): python examples/26_along_the_levels.py

→ along_the_levels.png: each row is a chain, each column its state when a noise level ends. The printed table is section
4.2's reason for the weight λ(σ) = σ²: σ·‖score‖ has about one size at all levels, that of the noise, √D. Some seconds,
with the bundled weights.
"""

import torch

from sgm_engine import Engine, annealed_langevin, load_bundled
from sgm_engine.images import grid, save_png, to_uint8

N = 6
model, _ = load_bundled()
plan = annealed_langevin(model.sigmas, 10, step_lr=4e-5, start="normal", start_scale=5.0, start_shift=0.13)
seen, sizes = {}, {}


def watch(info):
    """All chains are at one row: keep the last state of each level, and the mean of σ·‖score‖ over its rows."""
    level, sigma = info.levels[0], info.sigmas[0]
    seen[level] = info.x.clone()
    size = (info.denoised - info.before).flatten(1).norm(dim=1).mean() / sigma
    sizes.setdefault(level, []).append(size.item() / info.x[0].numel() ** 0.5)


Engine(model, batch=N).sample(N, seed=1, plan=plan, callback=watch)
for level, values in sizes.items():
    print(f"σ {model.sigmas[level]:7.4f}   σ·‖score‖/√D {sum(values) / len(values):.3f}")
columns = torch.stack(list(seen.values()), 1)  # [N, levels, 1, 28, 28]
save_png("along_the_levels.png", grid(to_uint8(columns.flatten(0, 1), quiet=True), columns=len(seen)))
