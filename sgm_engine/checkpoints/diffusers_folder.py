"""A diffusers folder: a UNet2DModel alone, or a pipeline of one and its scheduler. Without diffusers."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from sgm_engine.checkpoints.torch_file import CheckpointError, check_file
from sgm_engine.checkpoints.weights_file import State, open_state
from sgm_engine.files.reading import parse_json, read_bytes, short
from sgm_engine.files.writing import write_file
from sgm_engine.models.preconditioning import PREDICTIONS, ddpm_levels
from sgm_engine.models.unet2d import UNet2D

MAX_CONFIG_BYTES = 1 << 22
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Schedulers whose configuration is that of a DDPM: betas, prediction_type, timestep_spacing.
DDPM = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler", "LMSDiscreteScheduler",
        "DEISMultistepScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "PlanScheduler")  # fmt: skip
REFUSED = {
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "use_exponential_sigmas": False,
}


def open_folder(
    path: Path, ema: bool | None, opened: ExitStack, config: object = None
) -> tuple[State, dict[str, object]]:
    """The tensors of the folder's network, and the fields of its FamilyConfig."""
    if config is not None:
        raise CheckpointError("is a diffusers folder, which carries its own config: leave out config")
    unet, scheduler = path, path / "scheduler"
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        part = index.get("unet")
        if not (isinstance(part, list) and len(part) == 2 and part[1] == "UNet2DModel"):
            held = ", ".join(k for k in index if not k.startswith("_"))
            raise CheckpointError(
                f"is a {index.get('_class_name', 'pipeline')} of {held}, whose unet is no UNet2DModel: only those "
                "that draw images without text or latents can be read"
            )
        unet = path / "unet"
    elif (path / "unet" / "config.json").is_file() and not (path / "config.json").is_file():
        unet = path / "unet"
    if not (unet / "config.json").is_file():
        raise CheckpointError("is not a file, nor a diffusers folder: there is no config.json in it")
    fields = read_json(unet / "config.json")
    if fields.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise CheckpointError(f"holds a {fields['_class_name']}; only UNet2DModel is supported")
    network = _network(fields)
    weights = next((unet / name for name in WEIGHTS if (unet / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"lacks its weights: none of {', '.join(WEIGHTS)} is in {unet}")
    if ema:
        raise CheckpointError("holds one set of weights and no separate average: leave out ema=True")
    check_file(weights)
    state, _ = open_state(weights, None, opened)
    if sum(state.sizes.values()) > weights.stat().st_size:
        raise CheckpointError(f"describes more values in {weights.name} than it holds")
    renamed = {_renamed(name): name for name in state.shapes}
    state = state._replace(
        shapes={new: state.shapes[old] for new, old in renamed.items()},
        read=lambda name, inner=state.read: inner(renamed[name]),
        sizes={new: state.sizes[old] for new, old in renamed.items()} if state.sizes else {},
    )
    for folder in (scheduler, unet.parent / "scheduler", unet):
        if (folder / "scheduler_config.json").is_file():
            return state, _fields(network, read_json(folder / "scheduler_config.json"))
    raise CheckpointError(
        "has no scheduler_config.json, so its noise levels and prediction are not known: load the pipeline's folder, "
        "or put its scheduler/scheduler_config.json beside the weights"
    )


def read_json(path: Path) -> dict[str, object]:
    """An object with named fields; CheckpointError names the file."""
    try:
        check_file(path)
        found = parse_json(read_bytes(path, MAX_CONFIG_BYTES))
    except ValueError as error:
        raise CheckpointError(f"{path.name}: {short(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} is no object with named fields")
    return found


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new) if ".attentions." in name else name
    return name


def _network(fields: Mapping) -> dict[str, object]:
    known = inspect.signature(UNet2D).parameters
    own = {k: v for k, v in fields.items() if not k.startswith("_")}
    if unknown := [k for k, v in own.items() if k not in known and v is not None]:
        raise CheckpointError(f"config.json asks for {', '.join(unknown)}, which is not supported")
    if "sample_size" not in own or own["sample_size"] is None:
        raise CheckpointError("config.json lacks sample_size")
    return {k: v for k, v in own.items() if k in known}


def _fields(network: dict[str, object], scheduler: Mapping) -> dict[str, object]:
    name = scheduler.get("_class_name", "DDPMScheduler")
    if name not in DDPM:
        raise CheckpointError(
            f"has a {name}; the schedulers of DDPMs are supported: {', '.join(DDPM[:3])} and their like"
        )
    for field, only in REFUSED.items():
        if scheduler.get(field, only) != only:
            raise CheckpointError(f"has {field} {scheduler[field]!r} in its scheduler; only {only!r} is supported")
    scheme, first, last = ddpm_scheme(scheduler)
    clip = None
    if scheduler.get("clip_sample", name in ("DDPMScheduler", "DDIMScheduler")):
        clip = float(scheduler.get("clip_sample_range", 1.0))
    return {
        "architecture": "UNet2D",
        "network": network,
        "channels": network.get("in_channels", 3),
        "image_size": network["sample_size"],
        "preconditioning": scheme,
        "data_range": (-1.0, 1.0),
        "sigma_min": first,
        "sigma_max": last,
        "plan": {"name": "sde_dpm_solver_2m", "nfe": 30},
        "clip": clip,
        "family": f"diffusers UNet2DModel, {name}, {scheme['prediction']}",
    }


def ddpm_scheme(scheduler: Mapping) -> tuple[dict[str, object], float, float]:
    """(preconditioning, σ_min, σ_max) of a scheduler's configuration."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise CheckpointError(f"has prediction_type {prediction!r}; {', '.join(PREDICTIONS)} are supported")
    alphas = np.cumprod(1 - _betas(scheduler))
    trained = ddpm_levels(alphas)
    steps = {"spacing": scheduler.get("timestep_spacing", "leading"), "offset": scheduler.get("steps_offset", 0)}
    steps["scheduler"] = dict(scheduler)
    scheme = {"name": "ddpm", "alphas_cumprod": alphas.tolist(), "prediction": prediction, "steps": steps}
    return scheme, float(trained[0]), float(trained[-1])


def _betas(scheduler: Mapping) -> np.ndarray:
    """β [T] as diffusers' schedulers make them, in float32 where they do."""
    if scheduler.get("trained_betas") is not None:
        return np.asarray(scheduler["trained_betas"], np.float64)
    kind, count = scheduler.get("beta_schedule", "linear"), scheduler.get("num_train_timesteps", 1000)
    first, last = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    if type(count) is not int or not 2 <= count <= 100_000:
        raise CheckpointError(f"has num_train_timesteps {count!r}, where 2 to 100000 belong")
    if kind == "linear":
        return np.linspace(first, last, count)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(first), math.sqrt(last), count) ** 2
    if kind == "squaredcos_cap_v2":
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    if kind == "sigmoid":
        return (last - first) / (1 + np.exp(-np.linspace(-6, 6, count))) + first
    raise CheckpointError(
        f"has beta_schedule {kind!r}; linear, scaled_linear, squaredcos_cap_v2 and sigmoid are supported"
    )


def save_folder(model, path: Path) -> None:
    """A pipeline's folder of a loaded UNet2DModel: model_index.json, unet/ and scheduler/. ValueError for others."""
    from safetensors.torch import save

    config = getattr(model, "config", None)
    if getattr(config, "architecture", None) != "UNet2D":
        held = getattr(config, "architecture", type(model).__name__)
        raise ValueError(f"target: a diffusers folder holds a UNet2DModel, not a {held}: write NEW.safetensors")
    scheduler = config.preconditioning["steps"]["scheduler"]
    network = {"_class_name": "UNet2DModel", "_diffusers_version": "0.21.0", **config.network}
    kind = scheduler.get("_class_name", "DDPMScheduler")
    pipeline = "DDIMPipeline" if kind == "DDIMScheduler" else "DDPMPipeline"
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.21.0",
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", "UNet2DModel"],
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    files = {
        "unet/diffusion_pytorch_model.safetensors": save(tensors, {"format": "pt"}),
        "unet/config.json": _json(network),
        "scheduler/scheduler_config.json": _json(scheduler),
        "model_index.json": _json(index),
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(path / name, content)


def _json(fields: Mapping) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
