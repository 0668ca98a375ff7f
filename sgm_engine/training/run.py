"""One training run in a folder of its own: what ``sgm train`` does between its arguments and Lightning's Trainer.

Its lines are INFO of the logger "sgm_engine.training"; the command prints them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.checkpoints.checkpoint import save_checkpoint
from sgm_engine.data.images import Batches, load_images
from sgm_engine.files.locks import LockFile
from sgm_engine.files.reading import read_text
from sgm_engine.files.writing import append_line, remove, write_file
from sgm_engine.models.blocks import ConditionalInstanceNormPlus
from sgm_engine.models.cdm.model import CDM, OfClasses
from sgm_engine.models.family import FamilyModel
from sgm_engine.models.multi_sample import MeanScore
from sgm_engine.pace import clock
from sgm_engine.plans.law import DataLaw
from sgm_engine.training.callbacks import EMA, SampleGrid, live_network
from sgm_engine.training.cdm_fits import fit_base, fit_biases
from sgm_engine.training.config import PRECISIONS, WEIGHTS, TrainConfig
from sgm_engine.training.families import training_levels
from sgm_engine.training.far import Mirror
from sgm_engine.training.keeping import Keep, WholeFiles, lock, newest_checkpoint
from sgm_engine.training.module import ScoreModule
from sgm_engine.training.objectives import OBJECTIVES
from sgm_engine.training.reference import ReferenceBatch
from sgm_engine.training.start import has_labels, initialise, labels_of

log = logging.getLogger("sgm_engine.training")

MAY_CHANGE = {"steps", "direct_steps", "lr", "warmup", "decay", "clip", "precision", "compile_norms"}  # on resuming
MAY_CHANGE |= {"drop_every", "weights", "plan", "log_every", "sample_every", "save_every", "validate_every"}
OURS = "# data: "  # how config.yaml begins in a folder of this command's
BLOCK = 512  # images whose mean is taken at once
QUIET = 30.0  # seconds without a line, at most
HELD_OUT = 1024  # images of the test set that a validation looks at


@dataclasses.dataclass
class Job:
    """A run that has been checked: data are there, the network exists, the folder is this run's."""

    config: TrainConfig
    images: np.ndarray
    held_out: np.ndarray
    module: ScoreModule
    folder: Path
    resume: Path | None
    labels: dict[str, np.ndarray]  # by split; empty for a network without labels
    lock: LockFile | None  # this process's hold on the folder; the first process of a group has it
    mirror: Mirror | None = None  # where the folder is to be put

    def fit(self, accelerator: str = "auto", tensorboard: bool = False) -> None:
        """Train to the end, and write model.safetensors. The folder is free for another process after it."""
        try:
            self._fit(accelerator, tensorboard)
        except RuntimeError as error:
            if self.mirror is None:
                raise
            raise RuntimeError(self.mirror.shown(str(error))) from error
        finally:
            if self.lock is not None:
                self.lock.close()

    def _fit(self, accelerator: str, tensorboard: bool) -> None:
        c = self.config
        world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
        if c.batch % world:
            raise ValueError(f"batch must divide by the number of processes, {world}, got {c.batch}")
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            num_nodes=world // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            strategy="ddp" if world > 1 else "auto",
            precision=PRECISIONS[c.precision],
            max_steps=c.steps,
            max_epochs=-1,
            gradient_clip_val=c.clip or None,
            val_check_interval=c.validate_every or None,
            check_val_every_n_epoch=None,
            limit_val_batches=None if c.validate_every else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=c.log_every,
            logger=self._loggers(tensorboard),
            callbacks=self._callbacks(),
            plugins=[WholeFiles()],
            default_root_dir=self.folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if c.compile_norms:
            compile_norms(self.module.network)
        start = partial(_next_batch, trainer)
        batches = Batches(
            self.images, c.batch // world, c.seed, trainer.global_rank, world, start, self.labels.get("train")
        )
        seen = [self.held_out, *([self.labels["test"]] if "test" in self.labels else [])]
        held_out = TensorDataset(*(torch.from_numpy(np.array(part[:HELD_OUT])) for part in seen))
        validation = DataLoader(held_out, c.batch) if c.validate_every else None
        try:
            trainer.fit(self.module, DataLoader(batches, None), validation, ckpt_path=self.resume, weights_only=True)
        except SystemExit as error:  # Lightning's answer to Ctrl-C and, as the command raises it, to SIGTERM
            cause = error.__context__
            raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt()) from None
        if trainer.is_global_zero:
            network = live_network(trainer, self.module)
            if isinstance(network, CDM):
                fit_biases(network, self.images, c.seed, labels=self.labels.get("train"))
            written = self.folder / "model.safetensors"
            save_checkpoint(network, written, WEIGHTS[c.weights])
            self._changed()
            log.info("written: %s", written if self.mirror is None else self.mirror.shown(str(written)))

    def _changed(self) -> None:
        if self.mirror is not None:
            self.mirror.put()

    def _callbacks(self) -> list[pl.Callback]:
        c = self.config
        callbacks: list[pl.Callback] = [EMA(c.ema)] if c.ema else []
        if c.sample_every:
            callbacks.append(SampleGrid(c.sample_every, folder=self.folder / "samples", say=log.info))
        keep = Keep(self.folder / "checkpoints", c.save_every or c.steps, self._changed)
        return [*callbacks, Report(self.folder, c.log_every, keep), keep]

    def _loggers(self, tensorboard: bool) -> list:
        loggers = [CSVLogger(self.folder, "csv", flush_logs_every_n_steps=1)]
        return [*loggers, TensorBoardLogger(self.folder, "tensorboard")] if tensorboard else loggers


class Report(pl.Callback):
    """A line and a row of metrics.csv every ``every`` steps; stops a run whose loss is no longer finite.

    A line comes after the first step too, and wherever QUIET seconds had none.
    """

    def __init__(self, folder: Path, every: int, keep: Keep):
        self.path, self.every, self.keep = folder / "metrics.csv", every, keep
        self._total, self._count, self._began, self._said = 0.0, 0, 0.0, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()
        if trainer.global_step and trainer.is_global_zero:
            log.info("resumed at step %d", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, *_) -> None:
        self._total = self._total + trainer.callback_metrics["loss"].detach()
        self._count += 1
        step, now = trainer.global_step, time.perf_counter()
        if step % self.every:
            if trainer.is_global_zero and (self._said is None or now - self._said > QUIET):
                self._line(step, trainer.max_steps, "", (now - self._began) / self._count)
            return
        loss = float(self._total) / self._count
        seconds = (time.perf_counter() - self._began) / self._count
        self._total, self._count, self._began = 0.0, 0, time.perf_counter()
        if not np.isfinite(loss):
            raise self.keep.diverged(trainer, loss)
        if trainer.is_global_zero:
            append_line(self.path, f"{step},{loss:.4f},{seconds:.4f}")
            self._line(step, trainer.max_steps, f"  loss {loss:.3f}", seconds)

    def _line(self, step: int, of: int, loss: str, seconds: float) -> None:
        """seconds: of a step."""
        self._said = time.perf_counter()
        log.info(f"step {step:>7}/{of}{loss}  {seconds:.3f} s/step  {clock((of - step) * seconds)} left")


def prepare(
    config: TrainConfig,
    data: str | Path,
    folder: Path,
    init: str | Path | None = None,
    mirror: Mirror | None = None,
) -> Job:
    """Everything that can be refused is refused here. ``mirror``: of ``folder``, for a run on object storage."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file, name a folder")
    images = load_images(data, "train", size=config.image_size)
    held_out = load_images(data, "test", size=config.image_size) if config.validate_every else images[:0]
    if config.validate_every and len(held_out) == 0:
        raise ValueError("validate_every needs held-out data: there is none; set validate_every to 0")
    if len(images) == 0:
        raise ValueError(f"data: {data} holds no images")
    channels, height, width = images.shape[1:]
    if height != width:
        raise ValueError(f"data: images must be square, got {height}×{width}")
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation
        torch.manual_seed(config.seed)
        network = config.model(channels, height).build()
    if isinstance(network, OfClasses):
        fit_base(network, images)
    plan_for(network)  # a plan that cannot be had is refused now
    if isinstance(network, FamilyModel):
        network = network.at_sigmas(training_levels(config, network.config))
    network.law = DataLaw.of(images[i : i + BLOCK] for i in range(0, len(images), BLOCK))
    if init is not None:
        initialise(network, init)
    splits = {"train": images, **({"test": held_out} if config.validate_every else {})}
    labels = {split: labels_of(data, split, x, network.labels) for split, x in splits.items() if has_labels(network)}
    options = dict(config.objective_options)
    objective = partial(OBJECTIVES[config.objective], **options) if options else config.objective
    if config.reference_batch:
        objective = ReferenceBatch(images, config.reference_batch, config.flip, **options)
    module = ScoreModule(
        network.model if isinstance(network, MeanScore) else network,
        objective,
        config.lr,
        (config.beta1, config.beta2),
        config.adam_eps,
        config.warmup,
        config.decay,
        config.steps,
        config.flip,
        config.seed,
        config.direct_steps,
        config.label_dropout,
        config.drop_every,
    )
    folder.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"
    held = lock(folder) if first else None
    try:
        _claim(folder, config, images, labels.get("train"), first)
        resume, damaged = newest_checkpoint(folder / "checkpoints")
        if damaged and resume is None:
            raise ValueError(f"{damaged[0]}: is damaged, and there is no whole checkpoint: name another folder")
        if damaged and first:
            log.warning("%s: damaged; going on from %s", ", ".join(map(str, damaged)), resume)
            for path in damaged:
                remove(path)
        if mirror is not None and first:
            mirror.begin()
    except BaseException:
        if held is not None:
            held.close()
        raise
    return Job(config, images, held_out, module, folder, resume, labels, held, mirror)


def _claim(folder: Path, config: TrainConfig, images: np.ndarray, labels: np.ndarray | None, first: bool) -> None:
    """Write config.yaml; refuse a folder with another run (other samples, data or network) or with something else."""
    path = folder / "config.yaml"
    digest = hashlib.sha256(np.ascontiguousarray(images[:1000]).tobytes()).hexdigest()
    data = f"{OURS}{'×'.join(map(str, images.shape))}, sha256 of the first 1,000 {digest}"
    data += "" if labels is None else f", of the labels {hashlib.sha256(labels.tobytes()).hexdigest()}"
    ours = path.is_file() and read_text(path).startswith(OURS)
    if first and not ours and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise ValueError(f"--out {folder}: holds something else than a run of this command: name a new folder")
    if ours and any((folder / "checkpoints").glob("*.ckpt")):
        before = TrainConfig.read(path)
        for field in dataclasses.fields(config):
            old, new = getattr(before, field.name), getattr(config, field.name)
            if old != new and field.name not in MAY_CHANGE:
                raise ValueError(f"{folder} holds a run with {field.name}={old}, not {new}: name another folder")
        if read_text(path).splitlines()[0] != data:
            raise ValueError(f"{folder} holds a run on other data: name another folder")
    if first:
        write_file(path, data + "\n" + config.to_yaml())


def compile_norms(network: nn.Module) -> None:
    """torch.compile each norm: chains of memory-bound ops; the whole network would take minutes to compile."""
    for module in network.modules():
        if isinstance(module, ConditionalInstanceNormPlus):
            module.compile(dynamic=False)


def _next_batch(trainer: pl.Trainer) -> int:
    return trainer.fit_loop.total_batch_idx + 1
