"""A custom-kernel sampler engine for noise-conditional score models."""

from importlib import import_module
from os import path as _path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# An installation has kernels/ in here (setup.py). A source tree that is not installed has it beside this folder.
_here = _path.dirname(__file__)
if not _path.isdir(_path.join(_here, "kernels")):
    __path__.append(_path.dirname(_here))

if TYPE_CHECKING:
    from sgm_engine.acceleration import accelerate
    from sgm_engine.bundled import load_bundled
    from sgm_engine.calibration import calibrate_float8
    from sgm_engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
    from sgm_engine.conditioning import at_sigmas
    from sgm_engine.engine import Engine
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
    from sgm_engine.float8 import Float8Config
    from sgm_engine.graphs import GraphConfig
    from sgm_engine.guidance import classifier_free, classifier_guided, posterior, preconditioned, with_drift
    from sgm_engine.inverse import LinearOperator
    from sgm_engine.jobs.job import Job, generate
    from sgm_engine.likelihood import log_likelihood
    from sgm_engine.plan import Plan, ancestral, annealed_langevin, consistent_annealed, ddim, reverse_diffusion
    from sgm_engine.progress import StepInfo
    from sgm_engine.samplers import dpm_solver_2m, euler, heun, plan_of_nfe, predictor_corrector, sde_dpm_solver_2m
    from sgm_engine.schedule import cosine, geometric, karras, linear, ncsnv2
    from sgm_engine.score_model import as_score
    from sgm_engine.service import SamplerService

# Imported when first asked for, so that `import sgm_engine` and `sgm --help` do not wait for PyTorch.
_MODULES = {
    "acceleration": ("accelerate",),
    "bundled": ("load_bundled",),
    "checkpoint": ("CheckpointError", "load_checkpoint", "save_checkpoint"),
    "calibration": ("calibrate_float8",),
    "engine": ("Engine",),
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
    "conditioning": ("at_sigmas",),
    "float8": ("Float8Config",),
    "graphs": ("GraphConfig",),
    "guidance": (
        "classifier_free",
        "classifier_guided",
        "posterior",
        "preconditioned",
        "with_drift",
    ),
    "inverse": ("LinearOperator",),
    "jobs.job": ("Job", "generate"),
    "likelihood": ("log_likelihood",),
    "plan": ("Plan", "ancestral", "annealed_langevin", "consistent_annealed", "ddim", "reverse_diffusion"),
    "progress": ("StepInfo",),
    "samplers": ("dpm_solver_2m", "euler", "heun", "plan_of_nfe", "predictor_corrector", "sde_dpm_solver_2m"),
    "schedule": ("cosine", "geometric", "karras", "linear", "ncsnv2"),
    "score_model": ("as_score",),
    "service": ("SamplerService",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
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
    "save_checkpoint",
    "sde_dpm_solver_2m",
    "with_drift",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
