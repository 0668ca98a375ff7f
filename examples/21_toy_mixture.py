"""Why the noise is annealed (NCSN, figure 3): python examples/21_toy_mixture.py → toy_mixture.png

Two modes far apart, of weights 1/5 and 4/5. Langevin dynamics with the exact score cannot move mass between them and
keeps the weights of its start; annealed from noise that covers both, it finds the true ones. Needs matplotlib.
"""

import dataclasses

import torch
from matplotlib.figure import Figure

from sgm_engine import Engine, annealed_langevin, geometric
from sgm_engine.keys import Key
from sgm_engine.training.toy import Mixture

N = 1280
MODES = Mixture([0.2, 0.8], [[-5, -5], [5, 5]], [0, 0])  # with noise of σ = 1: the data
torch.set_num_threads(1)


def draw(sigmas, steps):
    """N chains of ``steps`` at each level from U[−8, 8]², with the exact score of the modes blurred by σ: [N, 2]."""
    plan = annealed_langevin(sigmas, steps, step_lr=0.1, convention="paper", denoise=False)
    plan = dataclasses.replace(plan, start_scale=16.0, start_shift=-8.0)
    noise = torch.tensor(sigmas)
    engine = Engine(lambda x, level: MODES.score(x, noise[level]), N, sigmas=sigmas, shape=(1, 1, 2))
    return engine.sample(N, seed=0, plan=plan).flatten(1)


key = Key(1, torch.arange(N))
panels = {
    "data": (MODES.sample(key) + key.normal(torch.empty(N, 2), 2).double(), 0.8),
    "Langevin dynamics": (draw([1.0], 1000), 0.508952),  # the law of these very chains, computed exactly
    "annealed Langevin dynamics": (draw(geometric(20, 1, 10), 100), 0.782295),
}
figure = Figure((10, 3.4), layout="constrained")
for axes, (name, (x, exact)) in zip(figure.subplots(1, 3, sharex=True, sharey=True), panels.items(), strict=True):
    upper = x.sum(1) > 0
    weight, width = upper.double().mean().item(), x[upper].std(0).mean().item()
    axes.plot(*x.T.numpy(), ".", markersize=2)
    axes.set(title=f"{name}\n{weight:.3f} in the upper mode", aspect="equal", xlim=(-9, 9), ylim=(-9, 9))
    error = (exact * (1 - exact) / N) ** 0.5
    print(f"{name:28} weight of the mode at (5, 5): {weight:.3f}, exactly {exact:.6f} ± {error:.3f}; width {width:.2f}")
figure.savefig("toy_mixture.png", dpi=110)
