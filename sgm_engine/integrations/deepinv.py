"""A score network as a denoiser for deepinv: plug-and-play, RED, ScorePrior, DiffPIR and whatever else calls one.

    from sgm_engine.integrations.deepinv import Denoiser
    prior = deepinv.optim.ScorePrior(Denoiser(model))          # model(x, level) → score, with .sigmas

The other way round, a deepinv denoiser as the engine's network: ``as_score(denoiser, "denoiser", sigmas)``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.executors.native.executor import NativeNetwork, refusal
from sgm_engine.executors.watch import same, tensors_of
from sgm_engine.plans.schedule import check_sigmas, nearest_level


class Denoiser(nn.Module):
    """forward(x [B, C, H, W], sigma) → x + σ²·score, the mean of the clean image given x (Tweedie).

    model: ``model(x, level int64 [B]) → score``; shared. sigmas [L]: None takes ``model.sigmas``. sigma, a number or a
    tensor [B], may lie between levels: the network is asked at the nearest, on a logarithmic scale, and one further
    outside than half of the outermost ratio raises ValueError. An NCSN or NCSNv2 on a CPU runs on the native executor
    where no gradient is asked for, and follows its weights, except what is written through ``.data``; everything else
    runs as the module does.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], sigmas=None):
        super().__init__()
        sigmas = getattr(model, "sigmas", None) if sigmas is None else sigmas
        if sigmas is None:
            raise ValueError("sigmas: the model has no .sigmas, so pass sigmas=[…], its noise levels, descending")
        self.model, self.sigmas = model, check_sigmas(sigmas)
        # for one shape of x: that, the network, and the tensors that it was made of
        self._native: tuple[tuple[int, ...], NativeNetwork, list[Tensor]] | None = None

    def forward(self, x: Tensor, sigma: float | Tensor, *args, **kwargs) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).cpu().numpy()
        if len(sigma) not in (1, len(x)):
            raise ValueError(f"sigma must be one number or one for each of {len(x)} images, got {len(sigma)}")
        sigma = np.broadcast_to(sigma, len(x))
        level = torch.from_numpy(self._levels(sigma)).to(x.device)
        variance = torch.tensor(sigma**2, dtype=x.dtype, device=x.device)[:, None, None, None]
        return x + variance * self._score(x, level)

    def _levels(self, sigma: np.ndarray) -> np.ndarray:
        s = self.sigmas
        reach = np.sqrt([s[0] / s[1], s[-2] / s[-1]]) * (1 + 1e-6) if len(s) > 1 else np.array([1.001, 1.001])
        low, high = s[-1] / reach[1], s[0] * reach[0]
        bad = np.flatnonzero(~((sigma >= low) & (sigma <= high)))
        if len(bad):
            raise ValueError(
                f"sigma = {sigma[bad[0]]:g}, but the network was trained from {s[-1]:g} to {s[0]:g}: keep sigma within "
                f"[{low:.4g}, {high:.4g}], or scale x and sigma together if the data's range is another"
            )
        return nearest_level(sigma, s)

    def _score(self, x: Tensor, level: Tensor) -> Tensor:
        gradient = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if gradient or x.device.type != "cpu" or x.dtype != torch.float32 or refusal(self.model) is not None:
            return self.model(x, level)
        found, tensors = self._native, tensors_of(self.model)  # another thread may put another in its place
        if found is None or found[0] != x.shape or not same(found[2], tensors):
            found = self._native = (x.shape, NativeNetwork(self.model, len(x), *x.shape[2:]), tensors)
        network = found[1]
        network.sync()
        return network(x, level)
