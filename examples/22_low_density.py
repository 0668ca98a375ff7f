"""Where there is no data there is no score (NCSN, figure 2): python examples/22_low_density.py → low_density.png

A network trained by sliced score matching on clean points of a mixture is right near them and arbitrary elsewhere;
trained with noise of many levels, it is right everywhere that level's noise reaches. Needs matplotlib.
"""

import torch
from matplotlib.figure import Figure

from sgm_engine.keys import Key
from sgm_engine.training import objectives
from sgm_engine.training.toy import Mixture, ScoreMLP

TRUTH = Mixture([0.2, 0.8], [[-5, -5], [5, 5]], [1, 1])
STEPS, BATCH = 1500, 256
torch.set_num_threads(1)


def train(sigmas, objective):
    model = ScoreMLP(sigmas, sigma_data=7.0)
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(STEPS):
        key = Key(0, torch.arange(step * BATCH, (step + 1) * BATCH))
        level = (key.uniform(torch.empty(BATCH, 1), 2)[:, 0] * len(model.sigmas)).long()
        loss = objective(model, TRUTH.sample(key).float(), level, key.after(3))
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)
        adam.step()
    return model


axis = torch.linspace(-8, 8, 65)
points = torch.cartesian_prod(axis, axis)
figure = Figure((10, 4), layout="constrained")
cases = {
    "clean data (σ = 0.01)": (train([0.01], objectives.sliced), 0),
    "noise of σ = 20 … 1, seen at σ = 5": (train([20.0, 10.0, 5.0, 2.2, 1.0], objectives.denoising), 2),
}
for axes, (name, (model, level)) in zip(figure.subplots(1, 2), cases.items(), strict=True):
    sigma = model.sigmas[level].item()
    exact, density = TRUTH.score(points, sigma), TRUTH.log_prob(points, sigma)
    with torch.no_grad():
        error = (model(points, torch.full((len(points),), level)) - exact).norm(dim=1) / exact.norm(dim=1).clamp(0.1)
    order = density.argsort(descending=True)
    quarters = [error[part].median().item() for part in order.chunk(4)]
    print(
        f"{name:36} median relative error, densest quarter of the square to emptiest:", *(f"{q:.2f}" for q in quarters)
    )
    image = axes.imshow(error.view(65, 65).T, origin="lower", extent=(-8, 8, -8, 8), vmin=0, vmax=1, cmap="magma")
    axes.contour(axis, axis, density.view(65, 65).T.exp(), 4, colors="w", linewidths=0.6)
    axes.set_title(f"{name}: relative error of the score")
figure.colorbar(image, ax=axes)
figure.savefig("low_density.png", dpi=110)
