"""A custom-kernel sampler engine for noise-conditional score models."""

from os import path as _path
from typing import TYPE_CHECKING

from sgm_engine.lazy import lazily
from sgm_engine.whereabouts import built, elsewhere

__version__ = "0.1.0"

_here = _path.dirname(__file__)
if not built(_here) and (_found := elsewhere(_here)):  # a clone that stands before an installation on sys.path
    __path__[:], __file__, _here = [_found], _path.join(_found, "__init__.py"), _found
# An installation has kernels/ in here (setup.py). A source tree that is not installed has it beside this folder.
if not _path.isdir(_path.join(_here, "kernels")):
    __path__.append(_path.dirname(_here))

if TYPE_CHECKING:
    from sgm_engine.checkpoints.bundled import load_bundled
    from sgm_engine.checkpoints.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
    from sgm_engine.engine.engine import Engine
    from sgm_engine.engine.progress import StepInfo
    from sgm_engine.errors import (
        Cancelled,
        CaptureFailed,
        DeadlineExceeded,
        EngineBusy,
        EngineError,
        JobBusy,
        QueueFull,
        SampleDiverged,
        ServiceClosed,
    )
    from sgm_engine.evaluation.likelihood import log_likelihood
    from sgm_engine.executors.graphs import GraphConfig
    from sgm_engine.jobs.job import Job, generate
    from sgm_engine.models.conditioning import at_sigmas
    from sgm_engine.models.guidance import classifier_free, classifier_guided, posterior, preconditioned, with_drift
    from sgm_engine.models.inverse import LinearOperator
    from sgm_engine.models.score_model import as_score
    from sgm_engine.plans.plan import Plan, ancestral, annealed_langevin, consistent_annealed, ddim, reverse_diffusion
    from sgm_engine.plans.samplers import (
        dpm_solver_2m,
        euler,
        heun,
        plan_of_nfe,
        predictor_corrector,
        sa_solver,
        sde_dpm_solver_2m,
    )
    from sgm_engine.plans.schedule import cosine, geometric, karras, linear, ncsnv2
    from sgm_engine.rewriting.acceleration import accelerate
    from sgm_engine.rewriting.float8.config import Float8Config
    from sgm_engine.service.service import SamplerService
    from sgm_engine.tuning.float8_calibration import calibrate_float8

__all__ = [
    "Cancelled",
    "CaptureFailed",
    "CheckpointError",
    "DeadlineExceeded",
    "Engine",
    "EngineBusy",
    "EngineError",
    "Float8Config",
    "GraphConfig",
    "Job",
    "JobBusy",
    "LinearOperator",
    "Plan",
    "QueueFull",
    "SampleDiverged",
    "SamplerService",
    "ServiceClosed",
    "StepInfo",
    "accelerate",
    "ancestral",
    "annealed_langevin",
    "as_score",
    "at_sigmas",
    "calibrate_float8",
    "classifier_free",
    "classifier_guided",
    "consistent_annealed",
    "cosine",
    "ddim",
    "dpm_solver_2m",
    "euler",
    "generate",
    "geometric",
    "heun",
    "karras",
    "linear",
    "load_bundled",
    "load_checkpoint",
    "log_likelihood",
    "ncsnv2",
    "plan_of_nfe",
    "posterior",
    "preconditioned",
    "predictor_corrector",
    "reverse_diffusion",
    "sa_solver",
    "save_checkpoint",
    "sde_dpm_solver_2m",
    "with_drift",
]

__getattr__, __dir__, _names = lazily(
    __name__,
    {
        "checkpoints.bundled": ("load_bundled",),
        "checkpoints.checkpoint": ("CheckpointError", "load_checkpoint", "save_checkpoint"),
        "engine.engine": ("Engine",),
        "engine.progress": ("StepInfo",),
        "errors": (
            "Cancelled",
            "CaptureFailed",
            "DeadlineExceeded",
            "EngineBusy",
            "EngineError",
            "JobBusy",
            "QueueFull",
            "SampleDiverged",
            "ServiceClosed",
        ),
        "evaluation.likelihood": ("log_likelihood",),
        "executors.graphs": ("GraphConfig",),
        "jobs.job": ("Job", "generate"),
        "models.conditioning": ("at_sigmas",),
        "models.guidance": ("classifier_free", "classifier_guided", "posterior", "preconditioned", "with_drift"),
        "models.inverse": ("LinearOperator",),
        "models.score_model": ("as_score",),
        "plans.plan": ("Plan", "ancestral", "annealed_langevin", "consistent_annealed", "ddim", "reverse_diffusion"),
        "plans.samplers": (
            "dpm_solver_2m",
            "euler",
            "heun",
            "plan_of_nfe",
            "predictor_corrector",
            "sa_solver",
            "sde_dpm_solver_2m",
        ),
        "plans.schedule": ("cosine", "geometric", "karras", "linear", "ncsnv2"),
        "rewriting.acceleration": ("accelerate",),
        "rewriting.float8.config": ("Float8Config",),
        "service.service": ("SamplerService",),
        "tuning.float8_calibration": ("calibrate_float8",),
    },
)
