"""The tensors of a weights file, ours or torch.save's, by name: found first, then read and checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sgm_engine.checkpoints.chosen_weights import Chosen, choose, is_state
from sgm_engine.checkpoints.torch_file import CheckpointError, Storage, StoredTensor, TorchFile
from sgm_engine.files.reading import open_file, open_safetensors, parse_json, short
from sgm_engine.models import ModelConfig
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.family import NETWORKS, FamilyConfig
from sgm_engine.models.multi_sample import MultiSampleConfig

FORMAT, FORMAT_VERSION = "sgm-engine", "1"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class State(NamedTuple):
    """Tensors by name, not read yet. sizes: bytes that each claims; empty where the format itself bounds them.

    family: of chosen_weights.FAMILIES, None for others. beside: what the file holds beside the network. averaged:
    whether these are averaged weights, None where that is not known. metadata: of one of our files.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    sizes: dict[str, int]
    family: str | None = None
    beside: State | None = None
    averaged: bool | None = None
    metadata: Mapping[str, str] = MappingProxyType({})


Config = ModelConfig | CDMConfig | FamilyConfig | MultiSampleConfig


def weights_of(model: nn.Module) -> nn.Module:
    """The module whose names a file has."""
    if isinstance(model.config, MultiSampleConfig):
        return getattr(model, "model", model).network
    return model.network if isinstance(model.config, FamilyConfig) else model


def open_state(path: Path, ema: bool | None, opened: ExitStack) -> tuple[State, Config | None]:
    with open_file(path) as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("is a Git LFS pointer, not the weights: run `git lfs pull`")
    if head[8:9] == b"{" and (head[4:8] == bytes(4) or not head.startswith((b"PK", b"\x80"))):
        # The first eight bytes are the header's length, and lengths that begin like a .pth are as common as others.
        return _open_safetensors(path, ema, opened)
    file = opened.enter_context(TorchFile(path))
    return _pick(file, ema, path.name), None


def _open_safetensors(path: Path, ema: bool | None, opened: ExitStack) -> tuple[State, Config | None]:
    try:
        file = opened.enter_context(open_safetensors(path, "pt"))
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"is not a sound safetensors file ({' '.join(str(error).split())[:120]})") from None
    shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}

    def read(name: str) -> Tensor:
        return file.get_tensor(name).clone()  # a clone: the file's own memory is mapped

    if "format" not in metadata or metadata["format"] == "pt":  # what safetensors' own savers write
        named = {n: StoredTensor(Storage(torch.float32, n, 0), 0, shape, ()) for n, shape in shapes.items()}
        if (chosen := choose(named, ema, path.name)) is not None:
            return _of(chosen, lambda t: read(t.storage.key), sized=False), None
    if ema:
        raise CheckpointError("holds one set of weights and no separate average: leave out ema=True")
    state = State(shapes, read, {})
    if "format" not in metadata or metadata["format"] == "pt":
        return state, None
    if metadata["format"] != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        found = metadata["format"], metadata.get("format_version")
        raise CheckpointError(f"has format {found}; this release reads {(FORMAT, FORMAT_VERSION)}")
    try:
        fields = parse_json(metadata.get("config", ""))
        return state._replace(metadata=metadata), _config(fields)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"has a bad config in its metadata: {short(error)}") from None


def _config(fields: object) -> Config:
    architecture = fields.get("architecture") if isinstance(fields, dict) else None
    if architecture in NETWORKS:
        return FamilyConfig.from_dict(fields)
    named = {kind.architecture: kind for kind in (CDMConfig, MultiSampleConfig)}
    return named.get(architecture, ModelConfig).from_dict(fields)


def _pick(file: TorchFile, ema: bool | None, name: str) -> State:
    """The weights among what was saved: of a known family, else the first that look like a network's."""
    content = file.content
    if (chosen := choose(content, ema, name)) is not None:
        return _of(chosen, file.read)
    if isinstance(content, (list, tuple)) and content:
        content = content[0]
    elif isinstance(content, dict) and not is_state(content):
        content = next((content[key] for key in ("model", "state_dict") if key in content), None)
    if not is_state(content):
        raise CheckpointError("holds no weights: neither a state_dict nor a list that begins with one")
    if ema:
        raise CheckpointError("holds no averaged weights: leave out ema=True")
    return _tensors(content, file.read)


def _of(chosen: Chosen, read: Callable[[StoredTensor], Tensor], sized: bool = True) -> State:
    state = _tensors(chosen.tensors, read, sized)
    beside = _tensors(chosen.beside, read, sized)
    averaged = chosen.averaged or (False if chosen.where else None)  # weights without a name may be either
    return state._replace(family=chosen.family, beside=beside, averaged=averaged)


def _tensors(stored: Mapping[str, StoredTensor], read: Callable[[StoredTensor], Tensor], sized: bool = True) -> State:
    return State(
        {name: t.shape for name, t in stored.items()},
        lambda name: read(stored[name]),
        {name: t.nbytes for name, t in stored.items()} if sized else {},
    )


def read_tensor(state: State, name: str) -> Tensor:
    """One tensor as float32, finite."""
    try:
        tensor = state.read(name)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"cannot give {name} ({' '.join(str(error).split())[:120]})") from None
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"has {name} of {tensor.dtype}, where floating point belongs")
    tensor = tensor.to(torch.float32)
    if not tensor.isfinite().all():
        raise CheckpointError(f"holds NaN or Inf in {name}: the training diverged or the file is damaged")
    return tensor
