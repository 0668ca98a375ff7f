"""Energies instead of scores: python examples/24_energies.py      half a minute of one core

A network says how unlikely a point is, E(x, σ) = −log q_σ(x) + const. Its score is −∇E, so denoising score matching
trains it through that gradient, and the engine draws from it. A score alone cannot say whether a Langevin step should
be taken; an energy can, and the Metropolis-adjusted chain keeps q_σ at any step size.
"""

import torch

from sgm_engine import Engine, annealed_langevin, as_score
from sgm_engine.cdm import mala
from sgm_engine.keys import Key
from sgm_engine.training import ScoreModule
from sgm_engine.training.toy import TRIPLE, EnergyMLP, gap

STEPS, BATCH, N = 1500, 256, 4000
torch.set_num_threads(1)

model = as_score(EnergyMLP([2.0, 1.0, 0.5, 0.2]), kind="energy")
module = ScoreModule(model, objective="denoising")
adam = torch.optim.Adam(module.parameters(), 5e-3)
for step in range(STEPS):
    ids = torch.arange(step * BATCH, (step + 1) * BATCH)
    adam.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)
    adam.zero_grad()
    module.loss(TRIPLE.sample(Key(1, ids)).float(), ids).backward()
    adam.step()
print(f"relative gap to the true score: {gap(model, TRIPLE, Key(99, torch.arange(20_000))):.3f}")


def spread(x):
    """Mean square distance to the nearest mode."""
    return (x.flatten(1).double()[:, None] - TRIPLE.means).square().sum(2).min(1).values.mean().item()


# Steps so long that plain Langevin leaves the law.
key = Key(2, torch.arange(100_000))
exact = TRIPLE.sample(key) + 0.2 * key.normal(torch.empty(100_000, 2), 2)
plan = annealed_langevin(model.sigmas, 100, step_lr=0.06, start="normal", start_scale=2.0, denoise=False)
plain, adjusted = Engine(model, N, shape=(1, 1, 2)).sample(N, plan=plan), mala(model, plan, N)
for name, x in {"data + 0.2·noise": exact, "plain Langevin": plain, "Metropolis-adjusted": adjusted.x}.items():
    print(f"{name:20} mean square distance to the nearest mode: {spread(x):.3f}")
print("acceptance by level:", *(f"{a:.2f}" for a in adjusted.acceptance.reshape(4, 100).mean(1)))
