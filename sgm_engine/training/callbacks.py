"""Lightning callbacks for anybody's run: the average of the weights, and sample grids drawn from it while it trains."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from sgm_engine.checks import check_int
from sgm_engine.engine.defaults import FEW, few_steps
from sgm_engine.engine.engine import Engine
from sgm_engine.errors import SampleDiverged
from sgm_engine.models.family import FamilyModel
from sgm_engine.models.multi_sample import MeanScore, MultiSample
from sgm_engine.outputs.images import grid, save_png
from sgm_engine.plans.plan import Plan
from sgm_engine.training.module import weights_dtype


class EMA(WeightAveraging):
    """Lightning's weight averaging with average ← d·average + (1 − d)·weights, d = min(decay, (1 + n)/(10 + n)).

    n counts updates, so a short run does not drag its first weights along (Lightning's EMAWeightAveraging has d = decay
    from the start). Buffers are not averaged: sigmas would drift by rounding.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        super().__init__(use_buffers=False, multi_avg_fn=partial(_ema_update, decay))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if (dtype := weights_dtype(pl_module)).itemsize < 4:
            rank_zero_warn(f"an average of {dtype} weights is too coarse to move: train with precision='bf16-mixed'")


@torch.no_grad()
def _ema_update(decay: float, average: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
    n = torch.as_tensor(n, device=average[0].device)
    weight = 1 - torch.clamp((1 + n) / (10 + n), max=decay)  # stays on the device
    for a, c in zip(average, current, strict=True):
        a.lerp_(c, weight.to(a.dtype))


class SampleGrid(Callback):
    """Every ``every`` optimizer steps, ``n`` samples of the current weights as one PNG, folder/00000500.png.

    The engine runs on the averaged weights where they lie if a WeightAveraging callback stands before this one in the
    list (Lightning's own or EMA), else on the module's: made once, no copy, no new capture. Sample i starts from the
    same noise every time, so the pictures show one set of samples as it improves.

    network: name of the module's attribute that is the score network, with ``sigmas`` and ``shape``.
    plan: None takes the network's own if that has at most 30 evaluations, else as few steps on its levels. say: told
        once what a grid costs. folder: None is <default_root_dir>/samples. engine: arguments for Engine, such as batch,
        precision or executor. With DDP the first process draws and the others wait for it.
    """

    def __init__(
        self,
        every: int = 500,
        n: int = 64,
        plan: Plan | None = None,
        folder: str | Path | None = None,
        network: str = "network",
        seed: int = 0,
        say: Callable[[str], object] = rank_zero_info,
        **engine,
    ):
        self.every, self.n = check_int("every", every, 1), check_int("n", n, 1)
        self.plan, self.seed, self.network, self.say = plan, seed, network, say
        self.folder, self.engine_options = folder and Path(folder), engine
        self.engine: Engine | None = None  # from the first grid on
        self._copy: nn.Module | None = None
        self._drawn = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        step = trainer.global_step
        if step % self.every or step == self._drawn or not trainer.is_global_zero:
            return
        self._drawn = step
        self.draw(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine = self._copy = None  # the average is another module in the next fit

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """Draw the grid of the present weights, write it, give it to the loggers: float32 [n, C, H, W]."""
        network = live_network(trainer, pl_module, self.network)
        if weights_dtype(network) != torch.float32:
            network = self._in_float32(network, getattr(pl_module, "sigmas", None))
        with evaluating(network):
            if self.engine is None or _weights(self.engine.model) is not _weights(network):
                on_gpu = pl_module.device.type == "cuda"
                batch = min(self.n, 128 if on_gpu else 16)
                self.engine = Engine(_drawing(network), **{"batch": batch} | self.engine_options)
            own, began = self.engine.default_plan, time.perf_counter()
            plan = self.plan or (own if own.nfe <= FEW else few_steps(self.engine.sigmas))
            try:
                x = self.engine.sample(self.n, self.seed, plan)
            except SampleDiverged as error:  # an early network may well; what is finite is worth a look
                rank_zero_warn(f"step {trainer.global_step}: {len(error.divergences)} of {self.n} samples diverged")
                x = error.samples
        if self.say is not None:
            seconds = time.perf_counter() - began
            self.say(
                f"a grid of {self.n} samples, {plan.nfe} evaluations each: {seconds:.1f} s, every {self.every} steps"
            )
            self.say = None
        if len(x):
            self._write(trainer, grid(self.engine.pictures(x)))
        return x

    @torch.no_grad()
    def _in_float32(self, network: nn.Module, sigmas: Tensor | None) -> nn.Module:
        """A copy of a network that trains in other precisions ("bf16-true"), brought up to date at every grid."""
        if self._copy is None:
            self._copy = copy.deepcopy(network).float()
        self._copy.load_state_dict(network.state_dict())
        if sigmas is not None and isinstance(getattr(self._copy, "sigmas", None), Tensor):
            self._copy.sigmas.copy_(sigmas)  # the network's own were rounded with its weights
        return self._copy

    def _write(self, trainer: Trainer, image) -> None:
        folder = self.folder or Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / f"{trainer.global_step:08d}.png", image)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # W&B's, and others that Lightning gives one
                logger.log_image("samples", [image], step=trainer.global_step)
            elif hasattr(logger.experiment, "add_image"):  # TensorBoard
                logger.experiment.add_image("samples", image, trainer.global_step, dataformats="HWC")


def _drawing(network: nn.Module) -> nn.Module:
    """What is drawn from, on the same weights: a network of a diffusion family, which trains at many levels, at the few
    of its plan; of a network of several copies the score of their mean."""
    if isinstance(network, MultiSample):
        return MeanScore(network)
    return network.at_sigmas(network.config.sigmas) if isinstance(network, FamilyModel) else network


def _weights(network: nn.Module) -> nn.Module:
    """What holds the weights: models of several levels or kinds may share it."""
    if isinstance(network, (MultiSample, MeanScore)):
        return network.network if isinstance(network, MultiSample) else network.model.network
    return network.network if isinstance(network, FamilyModel) else network


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode inside; then each of its parts in the mode that it was in, whatever happened."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def live_network(trainer: Trainer, pl_module: LightningModule, name: str = "network") -> nn.Module:
    """The attribute ``name`` of the averaged module while a WeightAveraging callback keeps one, else of the module."""
    averages = (c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging))
    average = next((a for a in averages if a is not None), None)
    module = pl_module if average is None else average.module
    if not isinstance(getattr(module, name, None), nn.Module):
        raise ValueError(f"network: {type(module).__name__} has no module {name!r}; name the attribute that holds it")
    return getattr(module, name)
