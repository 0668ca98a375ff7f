"""What of a classification diffusion model needs no training steps: its Gaussian, by moments, and its biases."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sgm_engine.data.images import dequantise
from sgm_engine.keys import Key
from sgm_engine.models.cdm.gaussian import GaussianBase, image_moments
from sgm_engine.models.cdm.model import CDM, OfClasses
from sgm_engine.models.cdm.potential import PotentialHead, PotentialNet

IMAGES, BATCH = 6000, 64  # that the biases are fitted to
SMOOTH = 1e-4  # of the biases' second differences, squared: classes that few images tell apart
LAST = 2**32 - 4  # the draws of the fit


def fit_base(model: OfClasses, images: np.ndarray) -> None:
    """Give the classifier's GaussianBase, if it has one, mean and covariance of uint8 images [N, C, H, W]."""
    for part in model.modules():
        if isinstance(part, GaussianBase):
            part.fit(*image_moments(images, model.scale, model.shift))


def fit_biases(
    model: CDM, images: np.ndarray, seed: int = 0, count: int = IMAGES, labels: np.ndarray | None = None
) -> tuple[float, float] | None:
    """Minimise the cross entropy of noisy images over the biases alone; (before, after), nats. None: a U-Net.

    It is convex in them, and the score does not depend on them. Classes are met as the model's prior says.
    labels: int64 [N], of a network that has any; every tenth is then hidden.
    """
    if not isinstance(model.classifier, PotentialNet):
        return None
    count = min(count, len(images))
    index = np.linspace(0, len(images) - 1, count).round().astype(int)
    key = Key(seed, torch.arange(count), LAST)
    u = key.uniform(torch.empty(count, 1))[:, 0]
    levels, head = model.draw_class(u), model.classifier.head
    told = None if labels is None else torch.from_numpy(labels[index])
    if told is not None:
        told[::10] = model.labels
    logits = noisy_logits(model, torch.from_numpy(images[index]), levels, key.after(1), told)
    return _minimise(head, logits, levels)


@torch.no_grad()
def noisy_logits(model: CDM, images: Tensor, levels: Tensor, key: Key, labels: Tensor | None = None) -> Tensor:
    """float64 [N, T + 2] of uint8 images with the noise of classes ``levels`` [N]; draws 0 and 1."""
    x = dequantise(images, key.uniform(images.float()))
    noise = key.normal(x, 1)
    training, found = model.training, []
    model.eval()
    for i in range(0, len(x), BATCH):
        t = levels[i : i + BATCH]
        signal, std = (v[t].float().view(-1, 1, 1, 1) for v in (model.signal, model.noise))
        u = signal * model.to_u(x[i : i + BATCH]) + std * noise[i : i + BATCH]
        found.append(model.logits(u, None if labels is None else labels[i : i + BATCH]))
    model.train(training)
    return torch.cat(found).double()


def _minimise(head: PotentialHead, logits: Tensor, levels: Tensor) -> tuple[float, float]:
    bias = torch.zeros(logits.shape[1] - 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([bias], max_iter=300, history_size=30, line_search_fn="strong_wolfe")

    def shifted() -> Tensor:
        return logits + F.pad(bias, (0, 1))

    def closure() -> Tensor:
        solver.zero_grad()
        rough = bias[2:] - 2 * bias[1:-1] + bias[:-2]
        loss = F.cross_entropy(shifted(), levels) + SMOOTH * rough.square().sum()
        loss.backward()
        return loss

    before = float(F.cross_entropy(logits, levels))
    solver.step(closure)
    head.add_biases(bias.detach())
    return before, float(F.cross_entropy(shifted().detach(), levels))
