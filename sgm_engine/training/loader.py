"""Images for anybody's Lightning run: every process its part, a resumed run the batches that it had not met."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from sgm_engine.data.images import Batches


class ImageBatches(pl.LightningDataModule):
    """``trainer.fit(module, ImageBatches(images, batch=32), ckpt_path=…)``; images uint8 [N, C, H, W], without end.

    batch: of one process. Rank, number of processes and position are the trainer's, so a run that is resumed in the
    middle of an epoch goes on with the batch that it would have met. workers: processes that read ahead.
    """

    def __init__(self, images: np.ndarray, batch: int, seed: int = 0, workers: int = 0):
        super().__init__()
        self.images, self.batch, self.seed, self.workers = images, batch, seed, workers

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        first = trainer.fit_loop.total_batch_idx + 1  # a number: the trainer itself cannot go to a worker
        batches = Batches(self.images, self.batch, self.seed, trainer.global_rank, trainer.world_size, first)
        return DataLoader(batches, None, num_workers=self.workers)
