"""Inpainting: pixels that are known take the place of the state's before every evaluation, with that row's noise.

y = known + σ·z, z of stream "inpaint": drawn once a level (NCSN's programs) or afresh each row (NCSNv2's). Which noise
that is depends on (seed, sample id, row) alone, as everything else does. A chain starts with y in its state; from then
on each row's update leaves the next row's y there (csrc/update.h), and the last row's the known pixels as given.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM

REDRAWS = ("level", "step")


class KnownRows(Protocol):
    """Of Tables: the noise of known pixels after each row."""

    known_sigma: Tensor
    known_draw: Tensor


class Known:
    """values: float32 [B, C, H, W] like x, what is known of each slot's sample; NaN elsewhere."""

    def __init__(self, x: Tensor):
        self.values = torch.full_like(x, torch.nan)
        self.images: Tensor | None = None  # of the running request, [n, C, H, W]
        self.redraw = REDRAWS[0]

    def begin(self, images: Tensor, redraw: str) -> None:
        """Of the k-th job of the request images[k] is known, as check_known returns it."""
        self.images, self.redraw = images, redraw

    def start(self, x: Tensor, slot: Tensor, indices: Tensor, seed: Tensor, sample_id: Tensor, sigma: float) -> Tensor:
        """Slots ``slot`` [k] begin jobs number ``indices`` [k] at noise sigma; x [k, C, H, W] with what is known."""
        known = self.images.index_select(0, indices)
        self.values.index_copy_(0, slot, known)
        z = torch.empty_like(known)
        ops.noise_fill_(z, seed, sample_id, 1, STREAM["inpaint"], "normal")  # a plan's first row has draw 1
        return torch.where(known.isnan(), x, z.mul_(sigma).add_(known))

    def arguments(self, tables: KnownRows) -> dict[str, Tensor]:
        """What the update is told."""
        draw = tables.known_draw[REDRAWS.index(self.redraw)]
        return {"known": self.values, "known_sigma": tables.known_sigma, "known_draw": draw}


def check_known(known, mask, n: int | None, shape: tuple[int, int, int], device) -> Tensor:
    """known where mask is True, else NaN: float32 [n, C, H, W] on ``device``. One image serves any n."""
    known, mask = torch.as_tensor(known), torch.as_tensor(mask)
    if known.dim() == 3:
        known = known[None].expand(1 if n is None else n, *known.shape)
    if known.dim() != 4 or tuple(known.shape[1:]) != shape or not known.is_floating_point():
        want = ", ".join(map(str, shape))
        raise ValueError(f"known must be floats [n, {want}] or [{want}], got {known.dtype} {list(known.shape)}")
    if n is not None and len(known) != n:
        raise ValueError(f"n is {n}, but known holds {len(known)} images: pass one image, or as many as samples")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a pixel is known, got {mask.dtype}: pass mask.bool()")
    try:
        mask = mask.expand(known.shape)
    except RuntimeError:
        raise ValueError(f"mask must broadcast to {list(known.shape)}, got {list(mask.shape)}") from None
    known = known.to(torch.float32)
    if not torch.where(mask, known, 0).isfinite().all():
        raise ValueError("known must be finite where mask is True; elsewhere it is not read")
    return torch.where(mask, known, torch.nan).to(device)
