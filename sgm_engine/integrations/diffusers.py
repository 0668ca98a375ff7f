"""diffusers: its networks in the engine, the engine in its pipelines.

from sgm_engine.integrations.diffusers import PlanPipeline, PlanScheduler, score_model
x = Engine(score_model(unet, scheduler), batch=16).sample(64)                       # in [−1, 1], as trained
pipe = DDPMPipeline(unet, PlanScheduler.from_config(scheduler.config))              # any pipeline, our scheduler
images = PlanPipeline(unet, PlanScheduler.from_config(scheduler.config))(batch_size=16).images   # the engine inside
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from sgm_engine.engine.engine import Engine
from sgm_engine.engine.progress import StepInfo
from sgm_engine.errors import Cancelled
from sgm_engine.integrations.diffusers_scheduler import PlanScheduler, PlanSchedulerOutput
from sgm_engine.integrations.foreign import seeds
from sgm_engine.models.score_model import ScoreModel, as_score

__all__ = ["PlanPipeline", "PlanScheduler", "PlanSchedulerOutput", "score_model"]


class _UNet(nn.Module):
    """A UNet2DModel as network(x float32, told [B]) → tensor. times: what told is multiplied by."""

    plan = {"name": "ancestral"}  # noqa: RUF012 - what Engine.sample does unless told otherwise
    data_range = (-1.0, 1.0)  # diffusers' convention

    def __init__(self, unet: nn.Module, times: float = 1.0):
        super().__init__()
        self.unet, self.times = unet, times
        self.training = unet.training

    @property
    def shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.unet(x.to(self.unet.dtype), told if self.times == 1 else told * self.times, return_dict=False)[0]


class _Negated(_UNet):
    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return -super().forward(x, told)


class Clipped(nn.Module):
    """The score of a model whose estimate of the clean image is held within ± limit."""

    def __init__(self, model: ScoreModel, limit: float):
        super().__init__()
        self.model, self.limit = model, float(limit)
        self.register_buffer("sigmas", model.sigmas.clone(), persistent=False)
        self.training = model.training

    shape = property(lambda self: self.model.shape)
    plan = property(lambda self: self.model.plan)
    data_range = property(lambda self: self.model.data_range)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        variance = self.sigmas.index_select(0, level)[:, None, None, None].square()
        clean = x + variance * self.model(x, level)
        return (clean.clamp(-self.limit, self.limit) - x) / variance


def score_model(unet: nn.Module, scheduler, num_inference_steps: int | None = None) -> nn.Module:
    """A UNet2DModel as f(x, level) → score of x = data + σ·noise, its parameters shared.

    scheduler: a PlanScheduler, whose current levels these are; or one whose configuration PlanScheduler takes, which is
    refused otherwise. num_inference_steps: how many noise levels; None: a PlanScheduler's, else 50.
    """
    scheduler = PlanScheduler.like(scheduler)
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps)
    score = _score(unet, scheduler)
    return Clipped(score, scheduler.config.clip_sample_range) if scheduler.config.clip_sample else score


def _score(unet: nn.Module, scheduler: PlanScheduler) -> ScoreModel:
    kind, sigmas = scheduler.kind, scheduler.sigmas
    if kind == "score":
        return as_score(_UNet(unet), "score", sigmas, condition="level")
    if kind == "edm":
        network = (_Negated if scheduler.config.prediction_type == "edm_negative" else _UNet)(unet)
        return as_score(network, "edm", sigmas, sigma_data=scheduler.config.sigma_data)
    if kind == "flow":
        return as_score(_UNet(unet, float(len(scheduler))), "flow", sigmas)
    return as_score(_UNet(unet), kind, None, None, scheduler.alphas_cumprod, scheduler.told)


class PlanPipeline(DiffusionPipeline):
    """Unconditional generation by the engine: the whole step fused, and captured on a GPU.

    unet: a UNet2DModel, of images in [−1, 1]. scheduler: a PlanScheduler, or one whose config it takes.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 - diffusers' own convention

    def __init__(self, unet: nn.Module, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=PlanScheduler.like(scheduler))
        self._engine: tuple[tuple, Engine] | None = None
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - diffusers' own convention
    ) -> ImagePipelineOutput | tuple:
        """batch_size images. generator: one, or one an image, from which seeds are drawn; None: torch's own.

        output_type: "pil", "np" [B, H, W, C] in [0, 1], "pt" [B, C, H, W] in [0, 1], or "latent" in [−1, 1].
        latents: the noise to start from, as every pipeline takes it. callback_on_step_end(pipe, i, t, {"latents": …})
        after every evaluation; it may set ``pipe._interrupt = True``, and the images are then as they are.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        if unknown := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs may hold 'latents' only, got {sorted(unknown)}")
        scheduler, engine = self.scheduler, self._prepare(batch_size, num_inference_steps)
        scales, self._interrupt, last = scheduler.scales, False, None
        init = None if latents is None else latents * (scheduler.init_noise_sigma / scales[0])

        def tell(info: StepInfo) -> None:
            nonlocal last
            i, last = info.step - 1, info.x
            with_latents = {"latents": info.x * scales[i + 1]} if callback_on_step_end_tensor_inputs else {}
            answer = callback_on_step_end(self, i, scheduler.timesteps[i], dict(with_latents)) or {}
            if answer.get("latents", with_latents.get("latents")) is not with_latents.get("latents"):
                raise ValueError("callback_on_step_end returned other latents: the engine's state cannot be replaced")
            if self._interrupt:
                last = last.clone()
                engine.cancel()

        show = not getattr(self, "_progress_bar_config", {}).get("disable", False)
        chosen = seeds(None, batch_size, generator)
        try:
            x = engine.sample(batch_size, chosen, scheduler.plan, 0, tell if callback_on_step_end else None, show, init)
        except Cancelled:
            x = last
        return self._output(x, output_type, return_dict)

    def _prepare(self, batch: int, levels: int) -> Engine:
        """The engine for this batch and these levels, kept for the next call: a capture takes some evaluations."""
        self.scheduler.set_timesteps(levels, self._execution_device)
        key = (batch, levels, id(self.unet), self.scheduler.plan.digest, self._execution_device)
        if self._engine is None or self._engine[0] != key:
            self._engine = key, Engine(score_model(self.unet, self.scheduler), batch, self._execution_device)
        return self._engine[1]

    def _output(self, x: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        if output_type != "latent":
            x = (x / 2 + 0.5).clamp(0, 1)  # of the data range that _UNet names
        if output_type in ("np", "pil"):
            x = x.cpu().permute(0, 2, 3, 1).numpy()
        images = self.numpy_to_pil(x) if output_type == "pil" else x
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
