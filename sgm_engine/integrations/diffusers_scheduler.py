"""``PlanScheduler``: a plan as a diffusers scheduler, for any of its pipelines. See integrations/diffusers.py.

A pipeline keeps the state as the network reads it, y = c_in·x, and hands over what the network returned, F. Both are
affine in (x, score), so a row of the plan is an affine row in (y, F) with the same noise: one fused update a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch import Tensor

from sgm_engine.integrations.diffusers_levels import Edm, Flow, Trained, translated
from sgm_engine.integrations.foreign import langevin, seeds
from sgm_engine.kernels import ops
from sgm_engine.keys import as_int64
from sgm_engine.models.score_model import KINDS, Row
from sgm_engine.plans import plan as plans
from sgm_engine.plans.plan import Plan
from sgm_engine.plans.schedule import check_sigmas

PREDICTIONS = {
    "epsilon": "vp_noise_prediction",
    "sample": "vp_denoiser",
    "v_prediction": "v_prediction",
    "score": "score",
    "edm": "edm",
    "edm_negative": "edm",
    "flow": "flow",
}
PLANS = {
    "annealed_langevin": langevin,
    "consistent_annealed": lambda s, steps, size: plans.consistent_annealed(s, steps),
    "ancestral": lambda s, steps, size: plans.ancestral(s),
    "ddim": lambda s, steps, size: plans.ddim(s),
}


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """prev_sample: the state after the step · pred_original_sample: the network's estimate of the clean image."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """Annealed Langevin dynamics and its relatives, over the noise levels of a DDPM or over ``sigmas``.

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: as of DDPMScheduler. prediction_type:
        "epsilon", "sample" or "v_prediction" of a DDPM; "score", of a network of data + σ·noise that is told the level:
        then sigmas, descending, are its levels; "edm" (sigma_min, sigma_max, sigma_data, sigma_schedule, rho as of
        EDMEulerScheduler; "edm_negative": with the sign that its v_prediction has); "flow" (shift as of
        FlowMatchEulerDiscreteScheduler), whose first level is t = 1 − 10⁻⁴, since t = 1 has an infinite σ.
    clip_sample, clip_sample_range: the estimate of the clean image is held within ± the range at every step, and the
        noise is what then remains, as DDPMScheduler has it (DDIMScheduler with use_clipped_model_output).
    plan: "ancestral", "ddim", "consistent_annealed" or "annealed_langevin". steps_per_level: of the last two.
    step: of annealed_langevin, α/σ² (below 2; NCSN 0.2 with 100 steps a level, NCSNv2 0.062 with 5).

    ``set_timesteps(n)`` takes n noise levels; a run is ``len(timesteps)`` network evaluations.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 - diffusers' own convention
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        sigmas: list[float] | None = None,
        plan: str = "ancestral",
        steps_per_level: int = 1,
        step: float = 0.1,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        rho: float = 7.0,
        shift: float = 1.0,
    ):
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")
        if plan not in PLANS:
            raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
        if (prediction_type == "score") != (sigmas is not None):
            raise ValueError("sigmas are the levels of a network with prediction_type='score': pass both or neither")
        if sigma_schedule not in ("karras", "exponential"):
            raise ValueError(f"sigma_schedule must be karras or exponential, got {sigma_schedule!r}")
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {clip_sample_range!r}")
        self.kind, self.alphas_cumprod = PREDICTIONS[prediction_type], None
        if sigmas is not None:
            sigmas = check_sigmas(sigmas).tolist()
            self.register_to_config(sigmas=sigmas)  # as JSON keeps them
            self._levels = Trained(np.array(sigmas[::-1]), by_step=False)
        elif self.kind == "edm":
            self._levels = Edm(num_train_timesteps, sigma_min, sigma_max, sigma_schedule, rho)
        elif self.kind == "flow":
            self._levels = Flow(num_train_timesteps, shift)
        else:
            alphas = np.cumprod(1 - _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas))
            self.alphas_cumprod = torch.from_numpy(alphas).float()
            self._levels = Trained(np.sqrt((1 - alphas) / alphas), by_step=True)
        self.set_timesteps(min(50, len(self)))

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **options):
        """From the configuration of a scheduler of diffusers. ValueError names a class or a field that a plan cannot
        stand for; what only chooses that scheduler's own steps (timestep_spacing, solver_order, …) is not used."""
        if isinstance(config, Mapping):
            config = translated(config)
        return super().from_config(config, return_unused_kwargs, **options)

    @classmethod
    def like(cls, scheduler: object, **options) -> PlanScheduler:
        """One for the network of another scheduler, which is returned if it is a PlanScheduler."""
        if isinstance(scheduler, cls):
            return scheduler
        return cls.from_config(dict(scheduler.config) | {"_class_name": type(scheduler).__name__}, **options)

    def __len__(self) -> int:
        return self._levels.count

    def row_at(self, sigmas: np.ndarray) -> Row:
        """What the network's output means at sigmas [L] (score_model.Row)."""
        row = KINDS[self.kind](sigmas, self.config.sigma_data)
        return row._replace(q=-row.q, s=-row.s) if self.config.prediction_type == "edm_negative" else row

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that a run starts from: 1, or the largest sigma of a "score" network."""
        return float(self.sigmas[0]) if self.kind == "score" else 1.0

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """That many noise levels, from the noisiest trained to the cleanest; ``timesteps`` has a value a row."""
        count = len(self)
        if not 1 <= num_inference_steps <= count:
            raise ValueError(
                f"num_inference_steps must be from 1 to {count}, the levels there are; got {num_inference_steps}"
            )
        self.num_inference_steps = num_inference_steps
        self.sigmas, told = self._levels.pick(num_inference_steps)
        self.row = self.row_at(self.sigmas)
        plan = PLANS[self.config.plan](self.sigmas, self.config.steps_per_level, self.config.step)
        scale = float(np.broadcast_to(self.row.c_in, len(self.sigmas))[0])
        self.plan = dataclasses.replace(
            plan, start="normal", start_scale=self.init_noise_sigma / scale, start_shift=0.0
        )
        self.told = told
        self.timesteps = torch.from_numpy(told[self.plan.level].copy()).to(device)
        self._coef, self._clean, self.scales = _in_the_networks_terms(self.plan, self.row, self.sigmas)
        self._draw = torch.arange(1, self.plan.nfe + 1, dtype=torch.int32)
        self._step_index = self._begin_index = None
        self._generator, self._seeds = None, None

    step_index = property(lambda self: self._step_index)
    begin_index = property(lambda self: self._begin_index)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the next run begins, for pipelines that start from an image."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: int | Tensor) -> int:
        """The first row that is told ``timestep``."""
        found = (self.timesteps == timestep).nonzero()
        if not len(found):
            raise ValueError(f"timestep {timestep} is none of scheduler.timesteps: call set_timesteps first")
        return int(found[0])

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The state is what the network reads: nothing to scale."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PlanSchedulerOutput | tuple[Tensor]:
        """One row: the state [B, ...] after it, in float32 inside and of model_output's dtype outside.

        generator: one, or a list of B, from which seeds are drawn as a run begins. With a list each sample's noise is
        its own generator's, whatever the batch. None: torch's own.
        """
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
            self._seeds = None
        if self._step_index >= self.plan.nfe:
            raise ValueError(f"the run of {self.plan.nfe} rows has ended: call set_timesteps for another")
        device, n = sample.device, len(sample)
        if self._seeds is None or generator is not self._generator or len(self._seeds[0]) != n:
            found = seeds(None, n, generator)
            keys, ids = ([found] * n, range(n)) if isinstance(found, int) else (found, [0] * n)
            self._seeds = [torch.tensor([*map(as_int64, v)], dtype=torch.int64, device=device) for v in (keys, ids)]
            self._generator = generator
        if self._coef.device != device:
            self._coef, self._draw = self._coef.to(device), self._draw.to(device)
        i, shape = self._step_index, sample.shape if sample.dim() == 4 else (n, 1, 1, sample[0].numel())
        x, found = (t.reshape(shape).float() for t in (sample, model_output))
        of_x, of_found = self._clean[i]
        if self.config.clip_sample:  # the output that says so
            limit = self.config.clip_sample_range
            found = ((of_x * x + of_found * found).clamp(-limit, limit) - of_x * x) / of_found
        row = torch.full((n,), i, dtype=torch.int64, device=device)
        after = ops.langevin_update(x, found, self._coef, self._draw, row, *self._seeds)
        self._step_index += 1
        after = after.reshape(sample.shape).to(model_output.dtype)
        if not return_dict:
            return (after,)
        clean = (of_x * x + of_found * found).reshape(sample.shape).to(model_output.dtype)
        return PlanSchedulerOutput(after, clean)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The state of clean images [B, ...] with the noise of ``timesteps`` [B]."""
        sigma = self._levels.sigma_of(timesteps.cpu().numpy())
        c_in = np.broadcast_to(self.row_at(sigma).c_in, sigma.shape)
        shape = (-1, *(1,) * (original_samples.dim() - 1))
        c_in, s = (torch.as_tensor(v.copy()).to(original_samples).reshape(shape) for v in (c_in, c_in * sigma))
        return c_in * original_samples + s * noise


def _in_the_networks_terms(
    plan: Plan, row: Row, sigmas: np.ndarray
) -> tuple[Tensor, list[tuple[float, float]], np.ndarray]:
    """The plan's rows for y = c_in·x and F, with score = q·(F − s·x): coef float32 [R, 4]. Also (u, v) of a row with
    denoised = u·y + v·F, and c_in [R + 1] of the state before each row; after the last it is x itself."""
    if plan.d.any():
        raise ValueError("the plan keeps a history (d != 0), which a scheduler's step has no place for")
    c_in, q, s = (np.broadcast_to(v, len(sigmas))[plan.level] for v in row[:3])
    scales = np.append(c_in, 1.0)
    ratio, after, variance = scales[1:] / scales[:-1], scales[1:], plan.sigma**2
    columns = (ratio * (plan.a - plan.b * q * s), after * plan.b * q, after * plan.c, np.zeros(plan.nfe))
    clean = list(zip(((1 - variance * q * s) / c_in).tolist(), (variance * q).tolist(), strict=True))
    return torch.from_numpy(np.stack(columns, 1)).float(), clean, scales


def _betas(steps: int, start: float, end: float, schedule: str, trained) -> np.ndarray:
    if trained is not None:
        return np.asarray(trained, dtype=np.float64)
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    raise ValueError(f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {schedule!r}")
