"""Inpainting: pixels that are known, put in place of the state's before every evaluation, at that row's noise.

y = known + σ·z, z of stream "inpaint": drawn once a level (NCSN's programs) or afresh each row (NCSNv2's). Which noise
that is depends on (seed, sample id, row) alone, as everything else does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sgm_engine.kernels import ops
from sgm_engine.kernels.noise import STREAM

if TYPE_CHECKING:
    from sgm_engine.slots import Slots, Tables

REDRAWS = ("level", "step")
TAG = STREAM["inpaint"] << 32  # on a sample id, it makes the update's stream 0 the inpaint stream (docs/noise.md)


class Known:
    """Of each slot: known float32 and mask bool (True where known), [B, C, H, W] like x."""

    def __init__(self, slots: Slots):
        self.known = torch.zeros_like(slots.x)
        self.mask = torch.zeros_like(slots.x, dtype=torch.bool)
        self.tagged = torch.zeros_like(slots.sample_id)
        self.images: Tensor | None = None  # of the running request, [n, C, H, W] each
        self.masks: Tensor | None = None
        self.redraw = "level"

    def begin(self, images: Tensor, masks: Tensor, redraw: str) -> None:
        """The k-th job of the request has images[k] where masks[k]."""
        self.images, self.masks, self.redraw = images, masks, redraw

    def start(self, slot: Tensor, indices: Tensor, sample_ids: Tensor) -> None:
        """Slots ``slot`` [k] begin jobs number ``indices`` [k]."""
        self.known.index_copy_(0, slot, self.images.index_select(0, indices))
        self.mask.index_copy_(0, slot, self.masks.index_select(0, indices))
        self.tagged.index_copy_(0, slot, sample_ids ^ TAG)

    def impose(self, slots: Slots, tables: Tables) -> None:
        """x ← known + σ·z where the mask is set, σ and z those of each slot's row."""
        draw = tables.level_draw if self.redraw == "level" else tables.draw
        ids = (slots.seed, self.tagged)
        noisy = ops.langevin_update(self.known, self.known, tables.known, draw, slots.row, *ids)
        torch.where(self.mask, noisy, slots.x, out=slots.x)

    def finish(self, x: Tensor, slot: Tensor) -> Tensor:
        """The samples x [k, C, H, W] of slots ``slot`` [k], with the known pixels as they were given."""
        return torch.where(self.mask.index_select(0, slot), self.known.index_select(0, slot), x)

    def tensors(self, tables: Tables) -> list[Tensor]:
        """What ``impose`` reads."""
        draw = tables.level_draw if self.redraw == "level" else tables.draw
        return [self.known, self.mask, self.tagged, tables.known, draw]


def check_known(known, mask, n: int | None, shape: tuple[int, int, int], device) -> tuple[Tensor, Tensor]:
    """known and mask as [n, C, H, W] on ``device``: float32 and bool. One image serves any n."""
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
    inside = torch.where(mask, known, 0)
    if not inside.isfinite().all():
        raise ValueError("known must be finite where mask is True; elsewhere it is not read")
    return inside.to(device, torch.float32), mask.to(device)
