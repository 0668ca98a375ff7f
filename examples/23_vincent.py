"""Score matching and denoising autoencoders are one objective (Vincent 2011), shown without noise in float64:

python examples/23_vincent.py      five objectives of the trainer, one gradient, and the constants between them
"""

from functools import partial

import torch

from sgm_engine.training import objectives
from sgm_engine.training.vincent import EnergyModel, Quadrature

SIGMA = 0.5
POINTS = [[0.0, 0.0], [1.0, 0.5], [-0.8, 1.1], [0.3, -1.2], [-1.4, -0.6], [1.5, 1.5], [0.7, -0.4]]
grid = Quadrature(torch.tensor(POINTS, dtype=torch.float64), SIGMA)  # expectations over the blurred points
cases = {
    "explicit    E½‖ψ − ∇log q‖²": (partial(objectives.explicit, score=grid.score), 1.0),
    "implicit    E[½‖ψ‖² + tr ∇ψ]": (objectives.implicit, 1.0),
    "sliced      E[½‖ψ‖² + vᵀ∇ψ·v]": (partial(objectives.sliced, projections=2), 1.0),
    "denoising   E½‖ψ − (x−x̃)/σ²‖²": (objectives.denoising, 1.0),
    "autoencoder E‖r(x̃) − x‖²/2σ⁴": (objectives.denoising_autoencoder, 1 / (2 * SIGMA**2)),
}

for seed in range(2):
    model, first = EnergyModel(dim=2, hidden=5, sigma=SIGMA, seed=seed), None
    print(f"\nθ number {seed}: energy model, 5 hidden units     J(θ)        J − J_explicit   ∂J/∂θ differs by at most")
    for name, (objective, factor) in cases.items():
        j = factor * grid.expectation(objective, model)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(j, list(model.parameters()))])
        first = (j, gradient) if first is None else first
        difference = (gradient - first[1]).abs().max()
        print(f"{name:45} {j:12.8f}  {j - first[0]:12.8f}     {difference:.1e}")
