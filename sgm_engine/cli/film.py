"""The annealing of a few samples as a moving picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sgm_engine.outputs import images

if TYPE_CHECKING:
    from sgm_engine.engine.engine import StepInfo
    from sgm_engine.plans.plan import Plan


class Film:
    """``engine.stream(ids, callback=film)``, then ``film.save(path, ids)``.

    Frames are evenly spaced over the rows of the plan, the last row included. Each holds the denoised image of every
    sample, whichever step and slot it reached that row in. shape: (C, H, W) of a sample. data_range: the engine's.
    """

    def __init__(
        self,
        sample_ids: Sequence[int],
        plan: Plan,
        shape: tuple[int, int, int],
        frames: int = 60,
        data_range: images.Range = images.UNIT,
    ):
        rows = np.unique(np.linspace(0, plan.nfe - 1, frames).round().astype(int))
        (c, h, w), self._data_range = shape, data_range
        self._frame = {int(row): i for i, row in enumerate(rows)}
        self._place = {sample_id: i for i, sample_id in enumerate(sample_ids)}
        self._pixels = np.zeros((len(rows), len(self._place), h, w, c), np.uint8)

    def __call__(self, info: StepInfo) -> None:
        shown = [
            (k, self._frame[row], self._place[sample_id])
            for k, (sample_id, row) in enumerate(zip(info.sample_ids, info.rows, strict=True))
            if row in self._frame and sample_id in self._place
        ]
        if shown:
            slots, frames, places = map(list, zip(*shown, strict=True))
            # A sample that diverges is left out by save; until then its pixels only have to be something.
            denoised = info.denoised[slots].nan_to_num(0, 1, 0)
            self._pixels[frames, places] = images.to_uint8(denoised, self._data_range, quiet=True)

    def __len__(self) -> int:
        return len(self._pixels)

    def save(self, path: Path, sample_ids: Sequence[int]) -> None:
        """A GIF of those of sample_ids that were filmed, one grid a frame, complete or not at all."""
        places = [self._place[i] for i in sample_ids if i in self._place]
        images.save_gif(path, [images.grid(frame[places]) for frame in self._pixels])
