"""A score network under Lightning: ScoreModule, for ``lightning.Trainer`` as any other LightningModule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sgm_engine.checks import check_int
from sgm_engine.data.images import dequantise
from sgm_engine.engine.engine import MAX_SEED
from sgm_engine.keys import Key
from sgm_engine.models.cdm.layers import dropping
from sgm_engine.training.cdm_objective import ddm
from sgm_engine.training.objectives import OBJECTIVES

# What a training sample draws, by number.
LEVEL, DEQUANTISATION, FLIP, OBJECTIVE = 0, 1, 2, 3
LABEL, DROPOUT = 1 << 15, (1 << 15) + 1  # far from what an objective draws; a number each layer that drops
VALIDATION = 1 << 16  # the first draw of a validation sample, whose id is its index


class ScoreModule(LightningModule):
    """Trains ``network(x [N, C, H, W], level [N]) → score`` by one of training.objectives.

    objective: a name of OBJECTIVES, or any function (model, x, levels, key) → loss. A batch is x, or a sequence that
    begins with x: float in the network's own range, or uint8, which is dequantised to [0, 1). A network with labels
    is told those behind x, int64 [N], and ``label_dropout`` of them as none. flip: mirror every second image, left to
    right. seed: uint64, of all noise.

    Adam with ``lr``, ``betas`` and ``adam_eps``. The learning rate rises linearly over ``warmup`` steps, stays, and
    falls linearly to 0 over the last ``decay`` share of ``steps`` (0: never), and by a tenth to a tenth after every
    ``drop_every`` steps (0: never). The plateau does not depend on ``steps``,
    so a run may be resumed with another length. The first ``direct_steps`` train a CDM by ``ddm``, with a
    rise and a fall of their own.

    Noise belongs to samples: number k = (t·processes + process)·N + position at batch t; levels, dequantisation, flips
    and noise are functions of (seed, k). So one process or several, resumed or not, take the same step on the same
    data. Every process must have the same N, on every batch.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: str | Callable[..., Tensor] = "denoising",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        warmup: int = 0,
        decay: float = 0.0,
        steps: int | None = None,
        flip: bool = False,
        seed: int = 0,
        direct_steps: int = 0,
        label_dropout: float = 0.1,
        drop_every: int = 0,
    ):
        super().__init__()
        if isinstance(objective, str) and objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)} or a function, got {objective!r}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], a share of the steps, got {decay}")
        if decay and steps is None:
            raise ValueError(f"decay={decay} needs steps, the length of the run")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {label_dropout}")
        self.label_dropout, self.drop_every = label_dropout, check_int("drop_every", drop_every, 0)
        self.network = network
        self.sigmas = torch.as_tensor(getattr(network, "sigmas", ())).detach().to("cpu", torch.float32)
        self.objective = OBJECTIVES[objective] if isinstance(objective, str) else objective
        self.lr, self.betas, self.adam_eps = lr, betas, adam_eps
        self.warmup, self.decay, self.steps = check_int("warmup", warmup, 0), decay, steps
        self.direct_steps = check_int("direct_steps", direct_steps, 0)
        self.flip, self.seed = flip, check_int("seed", seed, 0, MAX_SEED)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.network(x, level)

    def training_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int) -> Tensor:
        x, labels = self._parts(batch)
        loss = self.loss(x, self.sample_ids(len(x)), labels)
        self.log("loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    def sample_ids(self, n: int) -> Tensor:
        """Training sample numbers of the present batch, int64 [n]; see above."""
        t = self.trainer.fit_loop.total_batch_idx  # counted over all epochs, kept in checkpoints
        first = (t * self.trainer.world_size + self.global_rank) * n
        return torch.arange(first, first + n, device=self.device)

    def _parts(self, batch: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Images, and the labels of a network that has any."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        if not getattr(self.network, "labels", 0):
            return x, None
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise ValueError(f"a network of {self.network.labels} labels needs batches of images and labels")
        return x, batch[1]

    def loss(self, x: Tensor, sample_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The objective on data x [N, …] (float or uint8) as training samples ``sample_ids`` [N]; a scalar."""
        key = Key(self.seed, sample_ids)
        x = self.prepare(x, key)
        count = level_count(self.network)
        u = key.after(LEVEL).uniform(x.new_empty(len(x), 1, dtype=torch.float32))[:, 0]
        draw = getattr(self.network, "draw_class", None)  # a CDM's classes need not be met equally often
        levels = (u * count).long().clamp(max=count - 1) if draw is None else draw(u)
        told = {}
        if labels is not None:
            free = key.uniform(x.new_empty(len(x), 1), LABEL)[:, 0] < self.label_dropout
            told["labels"] = labels.masked_fill(free, self.network.labels)
        with dropping(self.network, key.after(DROPOUT)):
            return self._objective()(self._called(), x, levels, key.after(OBJECTIVE), **told)

    def _objective(self) -> Callable[..., Tensor]:
        first = self.direct_steps and self.trainer.fit_loop.total_batch_idx < self.direct_steps
        return ddm if first else self.objective

    def _called(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The network as an objective calls it: x and score stay float32 where its weights are not ("bf16-true")."""
        dtype = weights_dtype(self.network)
        return self.network if dtype == torch.float32 else InOwnDtype(self.network, dtype, self.sigmas.to(self.device))

    def prepare(self, x: Tensor, key: Key) -> Tensor:
        """uint8 → float32 in [0, 1), dequantised; then flips, if asked for."""
        if x.dtype == torch.uint8:
            x = dequantise(x, key.after(DEQUANTISATION).uniform(x.float()))
        if self.flip:
            mirrored = key.after(FLIP).uniform(x.new_empty(len(x), 1))[:, 0] < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x

    def validation_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The objective with the same noise every time; levels in turn."""
        x, labels = self._parts(batch)
        told = {} if labels is None else {"labels": labels}
        index = torch.arange(len(x), device=self.device) + batch_idx * len(x)
        key = Key(self.seed, index, VALIDATION)
        x = dequantise(x, key.after(DEQUANTISATION).uniform(x.float())) if x.dtype == torch.uint8 else x
        with torch.enable_grad():  # implicit and sliced score matching differentiate in x
            loss = self.objective(self._called(), x, index % level_count(self.network), key.after(OBJECTIVE), **told)
        self.log("val_loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=len(x))

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.network.parameters(), self.lr, self.betas, self.adam_eps)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self.learning_rate)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A resumed run takes this module's lr, warmup and decay, not those that its checkpoint was written with."""
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if getattr(schedule, "lr_lambdas", None) != [self.learning_rate]:
                continue  # somebody else's
            schedule.base_lrs = [self.lr]
            rate = self.lr * self.learning_rate(schedule.last_epoch)
            schedule._last_lr = [rate]
            schedule.optimizer.param_groups[0].update(initial_lr=self.lr, lr=rate)

    def learning_rate(self, step: int) -> float:
        """The factor of ``lr`` at optimizer step ``step`` = 0, 1, …"""
        first, steps = self.direct_steps, self.steps
        if step < first:
            steps = first
        elif first:
            step, steps = step - first, None if steps is None else steps - first
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (steps - step) / (self.decay * steps)) if self.decay else 1.0
        return min(rise, max(0.0, fall)) * (0.1 ** (step // self.drop_every) if self.drop_every else 1.0)


class InOwnDtype:
    """``network`` called with x in float32, as noise and loss are; it computes in ``dtype``, its weights'.

    sigmas: in full, where the network's own were rounded with its weights.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, sigmas: Tensor):
        self.network, self.dtype, self.sigmas = network, dtype, sigmas

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        return self.network(x.to(self.dtype), level).to(x.dtype)


def weights_dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters()), torch.float32)


def level_count(network: nn.Module) -> int:
    """Levels that an objective is given: those of sigmas, unless the network names another number (a CDM's classes)."""
    return getattr(network, "training_levels", None) or len(network.sigmas)
