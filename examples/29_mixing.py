"""How fast chains forget, by noise level (NCSN, section 3.2.2): python examples/29_mixing.py → mixing.png

At each level chains start where its law is, at a drawn digit plus σ·noise, and take steps of that level alone. What the
denoised state has in common with the first one says how far they have come: at large σ it is soon another digit, at
small σ it stays, which is why the noise is annealed. Needs matplotlib; a minute, with the bundled weights.
"""

from functools import partial

import torch
from matplotlib.figure import Figure

from sgm_engine import Engine, annealed_langevin, load_bundled
from sgm_engine.evaluation.features import open_extractor
from sgm_engine.images import to_uint8
from sgm_engine.keys import Key

N, STEPS, EVERY = 24, 60, 4
model, good = load_bundled()
engine, digits = Engine(model, batch=N), open_extractor("digits")
start = engine.sample(N, seed=5, plan=good).clamp(0, 1)
noise = Key(6, torch.arange(N)).normal(start)


def classes(x):
    pictures = torch.from_numpy(to_uint8(x.clamp(0, 1))).permute(0, 3, 1, 2)
    return torch.from_numpy(digits(pictures).logits).argmax(1)


def keep(every, info):
    if info.rows[0] % EVERY == 0:
        every[info.rows[0]] = info.denoised.clone()


def correlation(a, b):
    """Of the pixels of two images each, mean over the chains."""
    a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    return torch.nn.functional.cosine_similarity(a, b).mean().item()


figure = Figure((6, 3.4), layout="constrained")
axes = figure.subplots()
for sigma in model.sigmas[::2].tolist():
    plan = annealed_langevin([sigma], STEPS, step_lr=0.4 * sigma**2, denoise=False).on_levels(model.sigmas)
    every = {}
    engine.sample(N, seed=7, plan=plan, init=start + sigma * noise, callback=partial(keep, every))
    seen = list(every.values())
    alike = [correlation(x, seen[0]) for x in seen]
    other = (classes(seen[-1]) != classes(seen[0])).double().mean().item()
    print(f"σ {sigma:6.3f}   correlation with the first image {alike[-1]:.2f}   another digit {other:.0%}")
    axes.plot(range(0, EVERY * len(seen), EVERY), alike, label=f"σ = {sigma:.3g}")
axes.set(xlabel="steps at this level", ylabel="correlation with the first image", ylim=(0, 1.03))
axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
figure.savefig("mixing.png", dpi=90)
