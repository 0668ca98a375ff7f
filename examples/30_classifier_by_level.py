"""A classifier that denoises beside a denoiser, by level (CDM): python examples/30_classifier_by_level.py mnist/
→ classifier_by_level.png      (MNIST's IDX files; needs matplotlib; a minute)

The bundled CDM is trained to tell noise levels apart, and its gradient predicts the noise; the bundled NCSN is trained
to predict it. Of 50 held-out digits at each σ: what either prediction misses, as a share of the noise's variance.
"""

import sys

import torch
from matplotlib.figure import Figure

from sgm_engine import at_sigmas, load_bundled
from sgm_engine.data.images import dequantise, load_images
from sgm_engine.keys import Key

N = 50
cdm, ncsn = load_bundled("cdm")[0], load_bundled("mnist")[0]
inside = cdm.sigmas[(cdm.sigmas <= ncsn.sigmas[0]) & (cdm.sigmas >= ncsn.sigmas[-1])]
sigmas = inside[torch.linspace(0, len(inside) - 1, 7).long()].tolist()
key = Key(0, torch.arange(N))
pixels = torch.tensor(load_images(sys.argv[1], "test")[:N])
x = dequantise(pixels, key.uniform(pixels.float()))

missed = {"classifier (CDM)": [], "denoiser (NCSN)": []}
models = [at_sigmas(model, sigmas) for model in (cdm, ncsn)]
for level, sigma in enumerate(sigmas):
    z = key.normal(x, 1 + level)
    for model, values in zip(models, missed.values(), strict=True):
        with torch.no_grad():
            score = model(x + sigma * z, torch.full((N,), level))
        values.append((sigma * score + z).square().mean().item())
    print(f"σ {sigma:6.3f}", *(f"  {name} {values[-1]:.4f}" for name, values in missed.items()))

figure = Figure((5, 3), layout="constrained")
axes = figure.subplots()
for name, values in missed.items():
    axes.loglog(sigmas, values, "o-", label=name)
axes.set(xlabel="σ, pixels in [0, 1]", ylabel="share of the noise missed")
axes.legend()
figure.savefig("classifier_by_level.png", dpi=90)
