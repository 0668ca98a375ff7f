"""What a run begins with besides its images: the weights of another run, and labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.data.images import load_labels
from sgm_engine.models.cdm.model import OfClasses
from sgm_engine.models.family import FamilyModel
from sgm_engine.models.multi_sample import MeanScore
from sgm_engine.training.families import differences


def has_labels(network: nn.Module) -> bool:
    return isinstance(network, OfClasses) and network.labels > 0


def labels_of(data: str | Path, split: str, images: np.ndarray, count: int) -> np.ndarray:
    """int64 [N], each below ``count``."""
    labels = load_labels(data, split)
    if labels is None:
        raise ValueError(f"data: {data} holds no labels of its {split} images, and the network has {count}")
    if len(labels) != len(images) or labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"data: {data} has {len(labels)} labels from {labels.min()} to {labels.max()}, where {len(images)} from 0 "
            f"to {count - 1} belong"
        )
    return labels


def initialise(network: nn.Module, weights: str | Path) -> None:
    """Copy the weights of a checkpoint of the same network; its plan may be another."""
    start = load_checkpoint(weights)
    if isinstance(network, MeanScore):
        network, many = network.model.network, network.model.copies
        if not isinstance(start, MeanScore) or start.model.copies != many:
            raise ValueError(f"--init {weights}: holds no network of {many} copies")
        start = start.model.network
    if type(start.config) is not type(network.config):
        raise ValueError(f"--init {weights}: holds a {start.config.architecture}, not a {network.config.architecture}")
    if isinstance(network, FamilyModel):
        if differing := differences(start.config, network.config):
            raise ValueError(f"--init {weights}: holds another network: {'; '.join(differing)}")
        network.load_state_dict(start.state_dict())
        return
    theirs, ours = (dataclasses.replace(n.config, plan=None, sigmas=(1.0,)) for n in (start, network))
    same = len(start.sigmas) == len(network.sigmas) and torch.allclose(start.sigmas, network.sigmas, rtol=1e-4)
    if theirs != ours or not same:
        raise ValueError(f"--init {weights}: holds another network or sigmas: {start.config.to_json()}")
    state = {name: tensor for name, tensor in start.state_dict().items() if name != "sigmas"}
    network.load_state_dict(state, strict=False)
