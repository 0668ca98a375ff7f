"""What tells a model from another: its parameters and buffers as one digest, and whatever else decides its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from itertools import chain
from typing import NamedTuple

from torch import nn

from sgm_engine.jobs.digests import raw
from sgm_engine.jobs.settings import indistinct, own_config, settings


class ModelIdentity(NamedTuple):
    """weights: sha256, or what the user calls them. settings: empty if the user named the weights."""

    weights: str
    settings: Mapping[str, str]


def identity_of(model: Callable, weights: str | None = None) -> ModelIdentity:
    """weights: the user's name for all of the model; None: what ``weights_digest`` and ``settings`` find."""
    if weights is not None:
        return ModelIdentity(weights, {})
    return ModelIdentity(weights_digest(model), settings(model))


def weights_digest(model: Callable) -> str:
    """sha256 over class, configuration and every parameter and buffer (name, dtype, shape, bytes) of an nn.Module.

    The same network gives the same digest from a .pth, a .safetensors or a trainer. ValueError for a function or a
    module without parameters, which say nothing about themselves.
    """
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise ValueError(
            f"weights: a {type(model).__name__} without parameters cannot be told from another: pass weights='…', "
            "a name or digest that changes whenever the model does"
        )
    digest = hashlib.sha256(type(model).__qualname__.encode())
    if (config := own_config(model)) is not None:
        digest.update(config.to_json().encode())
    for name, tensor in sorted(chain(model.named_parameters(), model.named_buffers()), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        try:
            digest.update(raw(tensor))
        except (TypeError, RuntimeError):
            raise indistinct(name, tensor) from None
    return digest.hexdigest()
