"""Checkpoints: the originals of NCSN and NCSNv2 read safely, our own .safetensors read and written.

A file is never trusted: .pth files are read as data (torch_file.py), configurations through YAML's safe loader, names,
shapes and values are checked before the network exists. Whatever is wrong ends in CheckpointError, one line.
"""

from __future__ import annotations

import math
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sgm_engine.checkpoints.original_config import levels_between, read_config
from sgm_engine.checkpoints.torch_file import CheckpointError, check_file
from sgm_engine.checkpoints.weights_file import FLOATS, FORMAT, FORMAT_VERSION, State, open_state, read_tensor
from sgm_engine.files.reading import short
from sgm_engine.files.writing import write_file
from sgm_engine.models import ModelConfig
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.outputs.output import sorted_header
from sgm_engine.plans.schedule import check_sigmas

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
    config: ModelConfig | str | os.PathLike | None = None,
    *,
    sigmas=None,
    image_size: int | None = None,
    ema: bool | None = None,
    sha256: str | None = None,
) -> nn.Module:
    """The network of a checkpoint, float32, on the CPU, in evaluation mode; ``.config`` and ``.plan`` describe it.

    path: our .safetensors, or an original .pth (NCSN, NCSNv2: zip or older layout, with or without ``module.``), or a
        .pth of a plain state_dict, or of {"model": …, "ema": …}.
    config: a ModelConfig, or the path of the config.yml beside an original. Without it the architecture follows from
        names and shapes, and what those cannot tell from the published settings with the same number of levels.
    sigmas [L] descending, image_size in pixels: given, they win over config and published settings, not over the file;
        our own say all three themselves, and none may be given.
    ema: the averaged weights: None takes them where there are any, True insists, False refuses them.
    sha256: hexadecimal digest that the file must have.

    Raises CheckpointError (a ValueError): one line with the path, the reason and the remedy. Memory stays below twice
    the file plus 500 MB. Nothing in a file is ever executed.
    """
    path = Path(path)
    try:
        check_file(path, sha256)
        with ExitStack() as opened:
            state, own_config = open_state(path, ema, opened)
            given = {"config": config, "sigmas": sigmas, "image_size": image_size}
            if own_config is not None and (extra := [name for name, value in given.items() if value is not None]):
                raise CheckpointError(f"carries its own config: leave out {', '.join(extra)}")
            hints = _hints(config, sigmas, image_size)
            config = own_config or _infer(state, hints)
            return _fill(config, state, path.stat().st_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def save_checkpoint(model: nn.Module, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights and ``model.config`` as .safetensors: complete and on the disk, or not at all.

    model: one of sgm_engine.models. dtype: that of the file; float16 halves it, and loads as float32 again.
    Raises ValueError on values that are not finite in ``dtype``, OSError where the disk refuses.
    """
    path = Path(path)
    if not isinstance(getattr(model, "config", None), (ModelConfig, CDMConfig)):
        raise TypeError(f"model must be one of sgm_engine.models or a CDM, got {type(model).__name__}: use safetensors")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"model: {name} holds NaN or Inf, so it was not saved")
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": model.config.to_json()}
    write_file(path, sorted_header(save(state, metadata)))


def convert(source: str | os.PathLike, target: str | os.PathLike, **options) -> ModelConfig:
    """load_checkpoint(source, **options), saved as our .safetensors under ``target``; returns its configuration."""
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"target must end in .safetensors, got {target}")
    model = load_checkpoint(source, **options)
    save_checkpoint(model, target)
    return model.config


def _hints(config, sigmas, image_size) -> dict[str, object]:
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
            f"is not an NCSN or NCSNv2: {len(shapes)} tensors, the first {next(iter(shapes), 'none')!r}; "
            "other networks: load them yourself and use sgm_engine.as_score"
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
        raise CheckpointError("does not hold its noise levels: pass config= (its config.yml) or sigmas=")
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
            raise CheckpointError("does not hold its image size: pass config= (its config.yml) or image_size=")
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


def _fill(config: ModelConfig | CDMConfig, state: State, file_size: int) -> nn.Module:
    """The network with the state's weights, once every name, shape and size has been found to be right."""
    if (least := getattr(config, "least_tensors", 0)) > len(state.shapes):
        raise CheckpointError(f"describes a network of more than {least} tensors, and holds {len(state.shapes)}")
    try:
        with torch.device("meta"):
            model = config.build()
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"does not describe a network: {short(error)}") from None
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - state.shapes.keys()), sorted(state.shapes.keys() - expected.keys())
    if missing or extra:
        words = [f"{verb} {_some(names)}" for verb, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise CheckpointError(f"does not fit {config.architecture}: {' and '.join(words)}")
    for name, tensor in expected.items():
        if state.shapes[name] != tuple(tensor.shape):
            raise CheckpointError(f"has {name} of shape {list(state.shapes[name])}, where {list(tensor.shape)} belongs")
    if sum(state.sizes.values()) > file_size:
        raise CheckpointError("describes more values than it holds")
    weights = {name: read_tensor(state, name) for name in expected}
    if "sigmas" in weights and not torch.equal(weights["sigmas"], model.sigmas):
        raise CheckpointError("holds other sigmas than its config")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
