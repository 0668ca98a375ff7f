"""Checkpoints: those of NCSN, NCSNv2 and the diffusion families read safely, our own .safetensors read and written.

A file is never trusted: .pth files are read as data (torch_file.py), configurations through YAML's safe loader, names,
shapes and values are checked before the network exists. Whatever is wrong ends in CheckpointError, one line.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sgm_engine.checkpoints import published_cdm
from sgm_engine.checkpoints.changed import with_class, with_range
from sgm_engine.checkpoints.chosen_weights import nearest
from sgm_engine.checkpoints.diffusers_folder import save_folder
from sgm_engine.checkpoints.families import describe, is_elsewhere, local, open_elsewhere
from sgm_engine.checkpoints.notes import notes_of, take_notes
from sgm_engine.checkpoints.original_config import levels_between, read_config
from sgm_engine.checkpoints.torch_file import CheckpointError
from sgm_engine.checkpoints.weights_file import (
    FLOATS,
    FORMAT,
    FORMAT_VERSION,
    Config,
    State,
    open_state,
    read_tensor,
    weights_of,
)
from sgm_engine.files.reading import short
from sgm_engine.files.writing import write_file
from sgm_engine.models import ModelConfig
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.family import FamilyConfig
from sgm_engine.models.multi_sample import MultiSampleConfig
from sgm_engine.outputs.output import is_folder, sorted_header
from sgm_engine.pace import paced
from sgm_engine.plans.schedule import Sigmas, check_sigmas

__all__ = ["CheckpointError", "convert", "load_checkpoint", "read_config", "save_checkpoint"]


class Published(NamedTuple):
    """Settings of a published model: image size in pixels, σ₁, steps a level, step_lr, final denoising."""

    image_size: int
    sigma_begin: float
    steps_per_level: int
    step_lr: float
    denoise: bool

    @property
    def plan(self) -> dict[str, bool | int | float]:
        return {"steps_per_level": self.steps_per_level, "step_lr": self.step_lr, "denoise": self.denoise}


# By (architecture, levels, channels): MNIST; CIFAR-10 and CelebA; then arXiv 2006.09011, appendix B.
PUBLISHED = {
    ("NCSN", 10, 1): Published(28, 1, 100, 2e-5, False),
    ("NCSN", 10, 3): Published(32, 1, 100, 2e-5, False),
    ("NCSNv2", 232, 3): Published(32, 50, 5, 6.2e-6, True),
    ("NCSNv2", 500, 3): Published(64, 90, 5, 3.3e-6, True),
    ("NCSNv2Deeper", 788, 3): Published(96, 140, 4, 4.9e-6, True),
    ("NCSNv2Deeper", 1086, 3): Published(128, 190, 3, 1.8e-6, True),
    ("NCSNv2Deepest", 2311, 3): Published(256, 348, 3, 9e-7, True),
}
SIGMA_END = 0.01


def load_checkpoint(
    path: str | os.PathLike,
    config: ModelConfig | str | os.PathLike | Mapping | None = None,
    *,
    sigmas: Sigmas | None = None,
    image_size: int | None = None,
    ema: bool | None = None,
    sha256: str | None = None,
    class_labels: int | None = None,
    data_range: tuple[float, float] | None = None,
    guidance: float | None = None,
) -> nn.Module:
    """The network of a checkpoint, float32, on the CPU, in evaluation mode; ``.config`` and ``.plan`` describe it, the
    data's law ``.law`` and the front of plans ``.front`` are what our own files hold beside it, else None.

    path: our .safetensors; an original .pth of NCSN or NCSNv2; a checkpoint of score_sde, EDM, ADM,
        EDM2, improved-diffusion, denoising-diffusion-pytorch or CDM; a diffusers folder; Lightning's .ckpt with one of
        these inside; or "hf:owner/name".
    config: a ModelConfig, or the path of the config.yml beside an original, of the config .py beside one of
        score_sde, or ADM's flags; for tensors alone a FamilyConfig, or the path of its JSON.
        Without it the architecture follows from names and shapes, and what those cannot tell from the published
        settings; where there are none, the error says which argument decides.
    sigmas [L] descending, image_size in pixels: given, they win over config and published settings, not over the file;
        our own say all three themselves, and none may be given. sigmas of a diffusion family: in units of data in
        [0, 1].
    ema: the averaged weights: None takes them where there are any, True insists, False refuses them.
    sha256: hexadecimal digest that the file must have. class_labels: the class of the samples, where there are classes;
        guidance: of a CDM, the weight of classifier-free guidance towards it, 1 for none.
    data_range: (low, high) of what the network was trained on, where the file does not say it or says it wrongly: the
        samples of an NCSN are then of that range, those of a diffusion family in [0, 1] as ever.

    Raises CheckpointError (a ValueError): one line with the path, the reason and the remedy. Memory stays below twice
    the file plus 500 MB. Nothing in a file is ever executed.
    """
    name, given = path, {"config": config, "sigmas": sigmas, "image_size": image_size}
    try:
        path = local(path)
        with ExitStack() as opened:
            if is_elsewhere(path, sha256):
                state, own_config = open_elsewhere(path, ema, opened, given)
            else:
                state, own_config = open_state(path, ema, opened)
                if own_config is not None and (extra := [name for name, value in given.items() if value is not None]):
                    raise CheckpointError(f"carries its own config: leave out {', '.join(extra)}")
                if own_config is None and state.family == "CDM":
                    if extra := [name for name in ("config", "sigmas") if given[name] is not None]:
                        raise CheckpointError(f"says its own noise levels: leave out {', '.join(extra)}")
                    state, own_config = published_cdm.opened(state, image_size)
                elif own_config is None and state.family not in (None, "NCSN"):
                    own_config = describe(state, path, config, image_size)
            if own_config is None:
                own_config = _infer(state, _hints(config, sigmas, image_size))
                sigmas = None
            if class_labels is not None or guidance is not None:
                own_config = with_class(own_config, class_labels, guidance)
            if data_range is not None:
                own_config = with_range(own_config, data_range)
            size = path.stat().st_size if path.is_file() else None
            model = _fill(own_config, state, size)
            return model if sigmas is None else model.at_sigmas(sigmas)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def save_checkpoint(model: nn.Module, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights, ``model.config``, law and front as .safetensors: complete and on the disk, or not at all.

    model: one of sgm_engine.models. dtype: that of the file; float16 halves it, and loads as float32 again.
    Raises ValueError on values that are not finite in ``dtype``, OSError where the disk refuses.
    """
    path = Path(path)
    if not isinstance(getattr(model, "config", None), (ModelConfig, CDMConfig, FamilyConfig, MultiSampleConfig)):
        raise TypeError(f"model must be one of sgm_engine.models or a CDM, got {type(model).__name__}: use safetensors")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights_of(model).state_dict().items()
    }
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"model: {name} holds NaN or Inf, so it was not saved")
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": model.config.to_json()} | notes_of(model)
    write_file(path, sorted_header(save(state, metadata)))


def convert(source: str | os.PathLike, target: str | os.PathLike, **options: Any) -> Config:
    """load_checkpoint(source, **options), saved under ``target``; returns its configuration.

    target: NEW.safetensors is our own format, FOLDER/ a diffusers pipeline, which can hold a UNet2DModel.
    """
    _check_target(target)
    model = load_checkpoint(source, **options)
    save_as(model, target)
    return model.config


def save_as(model: nn.Module, target: str | os.PathLike) -> None:
    """Write a loaded model: NEW.safetensors, or a diffusers FOLDER/."""
    if _check_target(target):
        save_folder(model, Path(target))
    else:
        save_checkpoint(model, target)


def _check_target(target: str | os.PathLike) -> bool:
    """Whether it is a folder; ValueError for a file of another format."""
    folder = is_folder(os.fspath(target))
    if not folder and Path(target).suffix != ".safetensors":
        raise ValueError(f"target must end in .safetensors, or be a FOLDER/ for diffusers, got {target}")
    return folder


def _hints(config, sigmas: Sigmas, image_size) -> dict[str, object]:
    """Fields of ModelConfig that the caller knows."""
    if isinstance(config, ModelConfig):
        hints = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    else:
        hints = read_config(config) if config is not None else {}
    if sigmas is not None:
        hints["sigmas"] = tuple(check_sigmas(sigmas).tolist())
    if image_size is not None:
        hints["image_size"] = image_size
    return hints


def _infer(state: State, hints: dict[str, object]) -> ModelConfig:
    """Architecture, widths and channels from names and shapes; sigmas from the file or hints or what was published."""
    shapes = state.shapes
    first, norm = shapes.get("begin_conv.weight", ()), shapes.get("normalizer.embed.weight", ())
    if len(first) != 4 or not (len(norm) == 2 or "normalizer.alpha" in shapes):
        raise CheckpointError(
            f"is of no known family: {len(shapes)} tensors, first {next(iter(shapes), 'none')!r}; {nearest(shapes)}. "
            "Other networks: load them yourself and use sgm_engine.as_score"
        )
    fields: dict[str, object] = {"ngf": first[0], "channels": first[1]}
    if len(norm) == 2:
        fields["architecture"], levels = "NCSN", norm[0]
    else:
        deep = any(name.startswith("res5.") for name in shapes), any(name.startswith("res31.") for name in shapes)
        fields["architecture"] = {(0, 0): "NCSNv2", (1, 0): "NCSNv2Deeper"}.get(deep, "NCSNv2Deepest")
        levels = math.prod(shapes["sigmas"]) if "sigmas" in shapes else None
    for name, value in fields.items():
        if name in hints and hints[name] != value:
            raise CheckpointError(f"has {name} {value!r}, but the config says {hints[name]!r}")
    fields = {"divide_by_sigma": fields["architecture"] != "NCSN", "plan": None} | hints | fields

    published = PUBLISHED.get((fields["architecture"], levels, fields["channels"]))
    if "sigmas" in shapes:
        fields["sigmas"] = _same_sigmas(read_tensor(state, "sigmas").flatten(), hints.get("sigmas"))
    elif "sigmas" not in fields and published is None:
        how = "pass config= (its config.yml) or sigmas= (on the command line --config, --sigmas)"
        raise CheckpointError(f"does not hold its noise levels: {how}")
    elif "sigmas" not in fields:
        fields["sigmas"] = levels_between(published.sigma_begin, SIGMA_END, levels)
        warnings.warn(
            f"no config: assuming the published noise levels of {fields['architecture']}, σ {published.sigma_begin} → "
            f"{SIGMA_END} in {levels}; pass config= (its config.yml) or sigmas= if it was trained otherwise",
            stacklevel=3,
        )
    if levels is not None and len(fields["sigmas"]) != levels:
        raise CheckpointError(f"has {levels} noise levels, but {len(fields['sigmas'])} sigmas were given")
    if "image_size" not in fields:
        if published is None:
            how = "pass config= (its config.yml) or image_size= (on the command line --config, --image-size)"
            raise CheckpointError(f"does not hold its image size: {how}")
        fields["image_size"] = published.image_size
    if fields["plan"] is None and published and math.isclose(fields["sigmas"][0], published.sigma_begin, rel_tol=1e-4):
        fields["plan"] = published.plan
    try:
        return ModelConfig.from_dict(fields)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"does not describe a network: {error}") from None


def _same_sigmas(stored: Tensor, given) -> tuple[float, ...]:
    """The file's sigmas, after a look at whether those that were given (None: none) are the same to float32."""
    if given is not None:
        given = torch.as_tensor(given, dtype=torch.float32)
        if given.shape != stored.shape or not torch.allclose(stored, given, rtol=1e-5, atol=0):
            raise CheckpointError("holds other sigmas than were given: leave out sigmas=, or check the config")
    return tuple(stored.tolist())


def _fill(config: Config, state: State, file_size: int | None) -> nn.Module:
    """The network with the state's weights, once every name, shape and size has been found to be right."""
    if (least := getattr(config, "least_tensors", 0)) > len(state.shapes):
        raise CheckpointError(f"describes a network of more than {least} tensors, and holds {len(state.shapes)}")
    try:
        with torch.device("meta"):
            model = config.build()
    except (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"does not describe a {config.architecture}: {short(error)}") from None
    network = weights_of(model)
    expected = network.state_dict()
    held = {n: s for n, s in state.shapes.items() if not (isinstance(config, FamilyConfig) and n == "sigmas")}
    missing, extra = sorted(expected.keys() - held.keys()), sorted(held.keys() - expected.keys())
    if missing or extra:
        words = [f"{verb} {_some(names)}" for verb, names in (("lacks", missing), ("has unknown", extra)) if names]
        fits = sum(name in held and held[name] == tuple(t.shape) for name, t in expected.items())
        raise CheckpointError(
            f"does not fit {config.architecture}: {' and '.join(words)}; {fits} of its {len(expected)} tensors match"
        )
    for name, tensor in expected.items():
        if held[name] != tuple(tensor.shape):
            raise CheckpointError(f"has {name} of shape {list(held[name])}, where {list(tensor.shape)} belongs")
    if file_size is not None and sum(state.sizes.values()) > file_size:
        raise CheckpointError("describes more values than it holds")
    weights = {name: read_tensor(state, name) for name in paced(expected, len(expected), "reading weights", "tensors")}
    if "sigmas" in weights and not torch.equal(weights["sigmas"], model.sigmas):
        raise CheckpointError("holds other sigmas than its config")
    network.load_state_dict(weights, assign=True)
    model.averaged = state.averaged
    take_notes(model, state.metadata)
    return model.eval()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
