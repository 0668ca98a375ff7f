"""The checkpoints of a run's folder: each whole and finite or absent, the newest two; one process trains there."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from sgm_engine.files.locks import LockFile
from sgm_engine.files.reading import open_file, open_zip
from sgm_engine.files.writing import remove, staged

KEPT = 2


class Keep(Checkpoint):
    """Saves folder/00000500.ckpt every ``every`` optimizer steps and after the last, and keeps the newest two.

    What is kept goes by the files in the folder, not by what an earlier process remembers of them. A checkpoint has to
    prove itself: if the loss of the step after it is not finite, the one before it is what a run goes on from.
    ``changed`` is called after the folder has, by the first process of a group.
    """

    def __init__(self, folder: Path, every: int, changed: Callable[[], None] = lambda: None):
        self.folder, self.every, self.changed, self._saved = folder, every, changed, -1
        self._unproven: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            tidy(self.folder)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_) -> None:
        step = trainer.global_step
        if self._unproven is not None and not (loss := float(trainer.callback_metrics["loss"])) < float("inf"):
            raise self.diverged(trainer, loss)
        self._unproven = None
        if step == self._saved or (step % self.every and step != trainer.max_steps):
            return
        self._saved = step
        path = self.folder / f"{step:08d}.ckpt"
        trainer.save_checkpoint(path)
        self._unproven = path
        if trainer.is_global_zero:
            tidy(self.folder)
            self.changed()

    def diverged(self, trainer: pl.Trainer, loss: float) -> RuntimeError:
        """The error of a run whose loss is not finite; it names the checkpoint that is good."""
        if self._unproven is not None and trainer.is_global_zero:
            remove(self._unproven)
            self.changed()
        step, good = trainer.global_step, what_is_good(self.folder)
        return RuntimeError(f"the loss is {loss} at step {step}: lower lr, or set clip; {good}")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it; refuses one that holds NaN or ∞."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name := next(not_finite(checkpoint), None):
            raise RuntimeError(
                f"{name} is not finite at step {checkpoint.get('global_step')}: lower lr, or set clip; "
                + what_is_good(path.parent)
            )
        with staged(path) as temporary:
            torch.save(checkpoint, temporary)


def not_finite(value: object, name: str = "") -> Iterator[str]:
    """Names of the float tensors inside ``value`` that hold NaN or ∞."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
        yield name
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from not_finite(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for key, inner in enumerate(value):
            yield from not_finite(inner, f"{name}.{key}".lstrip("."))


def what_is_good(folder: Path) -> str:
    """For a message: the checkpoint that a run goes on from."""
    good = newest_checkpoint(folder)[0]
    return "there is no checkpoint yet" if good is None else f"{good} is good, and the same command goes on from it"


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, None if there is none, and newer ones that are damaged."""
    damaged = []
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        if whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def whole(path: Path) -> bool:
    """Whether every record of the archive is there, by its checksum."""
    try:
        with open_file(path) as file, open_zip(file, path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError):
        return False


def tidy(folder: Path) -> None:
    """Remove what a killed process left half-written, and all but the newest checkpoints. Its lock must be held."""
    for path in folder.glob(".*.tmp"):
        remove(path)
    for path in sorted(folder.glob("*.ckpt"))[:-KEPT]:
        remove(path)


def lock(folder: Path) -> LockFile:
    """Hold the folder until the lock is closed, or the process ends. ValueError if another one does."""
    file = LockFile(folder / ".lock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ValueError(f"{folder}: another process trains there: let it finish, or name another folder") from None
        raise ValueError(f"{folder}: this file system cannot lock files ({error.strerror}): name another") from None
    return file
