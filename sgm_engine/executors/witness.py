"""The proof of what no record can see: one image, put to the user's module and to what runs in its place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgm_engine.errors import out_of_memory
from sgm_engine.executors.network import Network
from sgm_engine.executors.protocol import Executor

# Relative: of one image, where a wrong network is off by O(1) and rounding by far less than this.
AGREEMENT = {"float32": 1e-3, "direct": 1e-3, "tf32": 1e-2, "bfloat16": 0.1, "float16": 0.02, "float8": 0.5}
# Relative: of one image, asked about alone and beside another. A batch may round in another order.
REPEATED = {"float32": 1e-4, "direct": 1e-4, "tf32": 1e-2, "bfloat16": 0.03, "float16": 0.01, "float8": 0.03}


class Witness:
    """Asks about two images that stay the same, at a level that moves on with every question."""

    def __init__(self, network: Network):
        self.network, self.turn = network, 0

    def refuse_draws(self, batch: int) -> None:
        """ValueError unless model(x, level) is a function of each image and its level: of no draw and no other image.

        Notices a model that writes to its input. batch: asked about if the model takes no other number of images.
        """
        allowed = REPEATED[self.network.precision] * (10 if self.network.device.type == "cuda" else 1)
        watch = self.network.watch
        for sizes in ((1, min(2, batch)), (batch, batch)):
            before, _ = watch.glance(), watch.look()
            try:
                first, second = (self._asked(n) for n in sizes)
            except Exception as error:  # it takes another number of images, or none: then a step says what is wrong
                if out_of_memory(error):
                    raise
                continue
            difference = relative(second[:1], first[:1])
            # Weights that are trained meanwhile prove nothing.
            if difference > allowed and watch.glance() == before and not watch.moved():
                raise ValueError(
                    f"model must be a function of x and level, but two calls with one image differ by {difference:.1e}:"
                    " it draws random numbers, or an image's score depends on the others of its batch (model.eval()?)"
                )
            return

    def disagreement(self, executor: Executor) -> float | None:
        """By how much the executor's answer to one image differs from the user's module's, if that is no rounding.

        Asked after the executor's ``sync_weights``, which has looked at them. Weights that are trained meanwhile prove
        nothing; a fused step that is under way shows in what they hold alone.
        """
        before = self.network.watch.glance()
        x, level = self._question(1)
        ours = executor.answer(x, level)
        if ours is None:
            return None
        try:
            theirs = self._asked(1)
        except Exception as error:  # of a module that only the executor can run, as one whose weights are bfloat16
            if out_of_memory(error):
                raise
            return None
        difference = relative(ours.float(), theirs)
        self.turn += 1
        if difference <= AGREEMENT[self.network.precision]:
            return None
        moved = self.network.watch.glance() != before or self.network.watch.moved()
        return None if moved else difference

    def _question(self, n: int) -> tuple[Tensor, Tensor]:
        """x [n, C, H, W], of which the first image is always the same but for its scale, and level [n].

        x grows with σ, as states do: a network that divides it by σ would see a constant, and rounding in its norms.
        """
        network, random = self.network, torch.Generator("cpu").manual_seed(0)
        at, sigmas = self.turn % (network.levels or 1), getattr(network.model, "sigmas", None)
        known = isinstance(sigmas, (Tensor, np.ndarray, list, tuple)) and np.shape(sigmas) == (network.levels,)
        scale = max(1.0, float(sigmas[at])) if known else 1.0
        x = (torch.rand(n, *network.shape, generator=random, dtype=torch.float32, device="cpu") * 2 - 0.5) * scale
        level = torch.full((n,), at, dtype=torch.int64, device=network.device)
        return x.to(network.device), level

    def _asked(self, n: int) -> Tensor:
        """The module's answer; the caller's random numbers are as they were."""
        x, level = self._question(n)
        before, version, devices = x.clone(), x._version, [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.random.manual_seed(self.turn * 8 + n)
            found = self.network.original(x, level)
        if x._version != version or not torch.equal(x, before):
            self.network.spare_x()
        return found.float()


@torch.no_grad()
def relative(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference by that of ``theirs``; 0 if neither is finite."""
    if not theirs.isfinite().all():
        return 0.0 if not ours.isfinite().all() else float("inf")
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).nan_to_num(float("inf")).item()
