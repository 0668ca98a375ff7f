"""The tensors of a weights file, ours or torch.save's, by name: found first, then read and checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from sgm_engine.checkpoints.torch_file import CheckpointError, StoredTensor, TorchFile
from sgm_engine.files.reading import open_file, open_safetensors, parse_json
from sgm_engine.models import ModelConfig
from sgm_engine.models.cdm.config import CDMConfig

FORMAT, FORMAT_VERSION = "sgm-engine", "1"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class State(NamedTuple):
    """Tensors by name, not read yet. sizes: bytes that each claims; empty where the format itself bounds them."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    sizes: dict[str, int]


def open_state(path: Path, ema: bool | None, opened: ExitStack) -> tuple[State, ModelConfig | CDMConfig | None]:
    with open_file(path) as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("is a Git LFS pointer, not the weights: run `git lfs pull`")
    if head[8:9] == b"{" and (head[4:8] == bytes(4) or not head.startswith((b"PK", b"\x80"))):
        # The first eight bytes are the header's length, and lengths that begin like a .pth are as common as others.
        return _open_safetensors(path, ema, opened)
    file = opened.enter_context(TorchFile(path))
    return _pick(file, ema), None


def _open_safetensors(path: Path, ema: bool | None, opened: ExitStack) -> tuple[State, ModelConfig | CDMConfig | None]:
    try:
        file = opened.enter_context(open_safetensors(path, "pt"))
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"is not a sound safetensors file ({' '.join(str(error).split())[:120]})") from None
    if ema:
        raise CheckpointError("holds one set of weights and no separate average: leave out ema=True")
    shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    state = State(shapes, lambda name: file.get_tensor(name).clone(), {})  # a clone: the file's own memory is mapped
    if "format" not in metadata or metadata["format"] == "pt":  # what safetensors' own savers write
        return state, None
    if metadata["format"] != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        found = metadata["format"], metadata.get("format_version")
        raise CheckpointError(f"has format {found}; this release reads {(FORMAT, FORMAT_VERSION)}")
    try:
        fields = parse_json(metadata.get("config", ""))
        return state, _config(fields)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"has a bad config in its metadata: {error}") from None


def _config(fields: object) -> ModelConfig | CDMConfig:
    cdm = isinstance(fields, dict) and fields.get("architecture") == CDMConfig.architecture
    return (CDMConfig if cdm else ModelConfig).from_dict(fields)


def _pick(file: TorchFile, ema: bool | None) -> State:
    """The weights among what was saved, by the layout of NCSN, NCSNv2 or a common one."""
    content, average = file.content, None
    if isinstance(content, (list, tuple)) and content:  # [state, optimizer] or [state, optimizer, epoch, step, ema]
        weights = content[0]
        if len(content) >= 5 and _is_state(content[-1]):
            average = content[-1]
    elif isinstance(content, dict) and not _is_state(content):
        weights = next((content[key] for key in ("model", "state_dict") if key in content), None)
        average = content.get("ema")
    else:
        weights = content
    if not _is_state(weights):
        raise CheckpointError("holds no weights: neither a state_dict nor a list that begins with one")
    if ema and not _is_state(average):
        raise CheckpointError("holds no averaged weights: leave out ema=True")
    stored = _without_prefix(weights)
    if _is_state(average) and ema is not False:
        sigmas = {"sigmas": stored["sigmas"]} if "sigmas" in stored else {}  # NCSNv2's average leaves them out
        stored = sigmas | _without_prefix(average)
    return State(
        {name: t.shape for name, t in stored.items()},
        lambda name: file.read(stored[name]),
        {name: t.nbytes for name, t in stored.items()},
    )


def _is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, StoredTensor) for k, v in value.items())
    )


def _without_prefix(state: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Without the ``module.`` that nn.DataParallel puts before every name."""
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


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
