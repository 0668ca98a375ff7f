"""Arguments of the engine, checked: every error names the argument, the value and the remedy."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import nn


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value >= high):
        raise ValueError(
            f"{name} must be at least {low}{f' and below 2**{high.bit_length() - 1}' if high else ''}, got {value}"
        )
    return int(value)


def check_shape(shape: object) -> tuple[int, int, int]:
    if shape is None:
        raise ValueError("shape: the model has no .shape, so pass shape=(C, H, W), that of one sample")
    shape = tuple(shape)
    if len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W), got {shape}")
    return tuple(check_int("shape", s, 1) for s in shape)


def place(model: object, device: torch.device | str | None) -> torch.device:
    """The device of the model, which is moved there if another one was asked for."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    home = next((t.device for t in tensors), None)
    if device is None:
        return home or torch.device("cpu")
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device='{device}' needs a CUDA build of PyTorch and a GPU; there is none: use device='cpu'"
            )
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if home not in (None, device):
        model.to(device)
    return device
