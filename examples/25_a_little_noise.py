"""A little noise steadies sliced score matching (NCSN, figure 1): python examples/25_a_little_noise.py

→ a_little_noise.png. Digits of 8 bits lie on a set without volume: most of their pixels never change. There the score
does not exist, and the loss has no minimum. With noise of variance 0.0001, which nobody sees, it has one. Needs
matplotlib; a minute.
"""

from itertools import pairwise

import torch
from matplotlib.figure import Figure

from sgm_engine import Engine, load_bundled
from sgm_engine.images import to_uint8
from sgm_engine.keys import Key
from sgm_engine.training import objectives

N, STEPS, BATCH = 256, 2500, 64
model, plan = load_bundled()
pixels = to_uint8(Engine(model, batch=64).sample(N, plan=plan))  # [N, 28, 28, 1]
DIGITS = torch.from_numpy(pixels).flatten(1).float() / 255
torch.set_num_threads(1)


class MLP(torch.nn.Module):
    """x [N, 784] → score; one level of noise, σ."""

    def __init__(self, sigma):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("sigmas", torch.tensor([sigma]))
        widths = [784, 256, 256, 784]
        layers = [part for a, b in pairwise(widths) for part in (torch.nn.Linear(a, b), torch.nn.ELU())]
        self.layers = torch.nn.Sequential(*layers[:-1])

    def forward(self, x, level):
        return self.layers(x)


def losses(sigma):
    """The loss ½‖s‖² + vᵀ∇s·v of every step, in thousands."""
    network, found = MLP(sigma), []
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    for step in range(STEPS):
        key = Key(0, torch.arange(step * BATCH, (step + 1) * BATCH))
        level = torch.zeros(BATCH, dtype=torch.int64)
        loss = objectives.sliced(network, DIGITS[key.sample_id % N], level, key, anneal_power=0)
        adam.zero_grad()
        loss.backward()
        adam.step()
        found.append(loss.item() / 1000)
    return torch.tensor(found)


figure = Figure((9, 3), layout="constrained")
cases = {"clean": 0.0, "with noise of variance 0.0001": 0.01}
for axes, (name, sigma) in zip(figure.subplots(1, 2), cases.items(), strict=True):
    curve = losses(sigma)
    smooth = curve.unfold(0, 25, 1).mean(1)  # of 25 steps
    rise = (1 - smooth / smooth.cummin(0).values)[STEPS // 2 :].max()
    print(f"{name:30} loss/1000 at the end {curve[-100:].mean():6.0f}; worst rise over the lowest so far {rise:.0%}")
    axes.plot(curve, linewidth=0.5)
    axes.set(title=name, xlabel="step", ylabel="loss of SSM / 1000")
figure.savefig("a_little_noise.png", dpi=90)
