"""A score network as a denoiser for deepinv: plug-and-play, RED, ScorePrior, DiffPIR and whatever else calls one.

    from sgm_engine.integrations.deepinv import Denoiser
    prior = deepinv.optim.ScorePrior(Denoiser(model))          # model(x, level) → score, with .sigmas

The other way round, a deepinv denoiser as the engine's network: ``as_score(denoiser, "denoiser", sigmas)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.errors import out_of_memory
from sgm_engine.executors.native.executor import NativeNetwork
from sgm_engine.executors.witness import AGREEMENT, relative
from sgm_engine.plans.schedule import check_sigmas, nearest_level
from sgm_engine.rewriting.observed import Observed

PROVEN = 256  # images


class Denoiser(nn.Module):
    """forward(x [B, C, H, W], sigma) → x + σ²·score, the mean of the clean image given x (Tweedie).

    model: ``model(x, level int64 [B]) → score``; shared. sigmas [L]: None takes ``model.sigmas``. sigma, a number or a
    tensor [B], may lie between levels: the network is asked at the nearest, on a logarithmic scale, and one further
    outside than half of the outermost ratio raises ValueError. What the native executor can run it runs, float32 images
    on a CPU where no gradient is asked for; everything else runs as the module does. It is looked at once for a size of
    images, and again when the module has become another. It follows its weights, except what is written through
    ``.data``; every PROVEN images one answer is compared with the module's.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], sigmas=None):
        super().__init__()
        sigmas = getattr(model, "sigmas", None) if sigmas is None else sigmas
        if sigmas is None:
            raise ValueError("sigmas: the model has no .sigmas, so pass sigmas=[…], its noise levels, descending")
        self.model, self.sigmas = model, check_sigmas(sigmas)
        self._fast: _Fast | None = None  # for one shape of x

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
        if gradient or x.device.type != "cpu" or x.dtype != torch.float32:
            return self.model(x, level)
        fast = self._fast  # another thread may put another in its place
        if fast is None or fast.shape[1:] != x.shape[1:] or fast.observed.changed():
            fast = self._fast = _Fast(self.model, x.shape, len(self.sigmas))
        found = fast(x, level)
        return self.model(x, level) if found is None else found


class _Fast:
    """A module on the native executor, for images of one size; None where it cannot run it."""

    def __init__(self, model: Callable, shape: Sequence[int], levels: int):
        self.model, self.shape, self.levels = model, shape, levels
        self._prepare()

    def _prepare(self) -> None:
        """due: images until an answer is compared."""
        self.observed, self.due = Observed(self.model), 0
        batch, channels, *size = self.shape
        try:
            self.network = NativeNetwork(self.model, batch, *size, channels=channels, levels=self.levels)
        except Exception as reason:  # Unsupported, or what the user's forward raises at this size
            if out_of_memory(reason):
                raise
            self.network = None

    def __call__(self, x: Tensor, level: Tensor) -> Tensor | None:
        for _ in range(2):
            if self.network is None:
                return None
            self.network.sync()
            found = self.network(x, level)
            self.due -= len(x)
            if self.due >= 0:
                return found
            if relative(found[:1], self.model(x[:1].clone(), level[:1])) <= AGREEMENT["float32"]:
                self.due = PROVEN
                return found
            self._prepare()  # it has become another, in what no record sees
        self.network = None
        return None
