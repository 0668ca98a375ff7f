"""Several noisy copies of one x: y_m = x + σ·ε_m, m = 1 … M.

Their mean ȳ is sufficient, and its noise is σ/√M. So E[x | y_1 … y_M] = ȳ + (σ²/M)·∇log p_{σ/√M}(ȳ): a model of M
copies at σ knows, in the limit, exactly what a model of one copy knows at σ/√M. docs/training.md has the experiment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sgm_engine.keys import Key


def tweedie(ys: Tensor | Sequence[Tensor], sigma: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """M observations of one x with noise σ, [M, N, …] or M tensors, as one: (ȳ [N, …], σ/√M).

    Any one-sample model takes it from there: x̂ = ȳ + (σ²/M)·score(ȳ, σ/√M) is E[x | y_1 … y_M].
    """
    ys = ys if isinstance(ys, Tensor) else torch.stack(list(ys))
    if ys.dim() < 2 or len(ys) == 0:
        raise ValueError(f"ys must be M ≥ 1 observations [M, N, …], got shape {tuple(ys.shape)}")
    return ys.mean(0), sigma / math.sqrt(len(ys))


def score(x_hat: Tensor, mean: Tensor, sigma: Tensor | float, copies: int) -> Tensor:
    """M·(x̂ − ȳ)/σ²: the score at ȳ, noise σ/√M, from the prediction x̂ of an M-sample model (Tweedie).

    (x̂ − ȳ)/σ², without the M, is the score of neither σ nor σ/√M.
    """
    return copies * (x_hat - mean) / sigma**2


def copies_of(mean: Tensor, sigma: Tensor | float, copies: int, key: Key) -> Tensor:
    """M observations whose mean is ``mean`` [N, C, …], stacked as channels [N, M·C, …]: what an M-sample model is fed.

    Given their mean, the deviations are σ·(z_m − z̄), whatever x is. Draw m of key is z_m.
    """
    z = torch.stack([key.normal(mean, m) for m in range(copies)])
    return torch.cat(list(mean + sigma * (z - z.mean(0))), 1)
