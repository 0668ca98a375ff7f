"""Score-matching objectives as pure functions."""

from __future__ import annotations

from torch import Tensor


def denoising_score_matching(model, x: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """½·σ²·Σ_pixels (s(x + σ·z) + z/σ)², mean over the batch (NCSN, arXiv 1907.05600, eqs. 5–6 with λ(σ) = σ²).

    x: [N, C, H, W]; level: [N] int64; noise: z ~ N(0, I), like x. Returns a scalar.
    """
    sigma = model.sigmas[level][:, None, None, None]
    score = model(x + sigma * noise, level).to(x.dtype)
    return 0.5 * (sigma * score + noise).square().sum((1, 2, 3)).mean()
