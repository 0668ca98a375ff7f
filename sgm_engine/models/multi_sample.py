"""Networks that see M noisy copies y_m = x + √M·σ·z_m of one x, whose mean ȳ has noise σ, and predict x.

A score network of M·C channels, whatever it is, becomes one by averaging its answer over the copies:

    x̂ = ȳ + σ²·(1/M)·Σ_m s_m(y_1 … y_M)

In the limit that is E[x | y_1 … y_M]. Two score models follow from it (docs/training.md): of the mean, at noise σ,
``MeanScore``; and of all copies at once, at their noise √M·σ, ``JointScore``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.kernels import noise
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.models.config import ModelConfig
from sgm_engine.outputs.images import range_of
from sgm_engine.plans.schedule import Sigmas

MAX_COPIES = 64
NOTES = ("plan", "law", "front")  # what comes with weights


def _check_copies(copies: int) -> int:
    if type(copies) is not int or not 2 <= copies <= MAX_COPIES:
        raise ValueError(f"copies must be an integer from 2 to {MAX_COPIES}, got {copies!r}")
    return copies


@dataclasses.dataclass(frozen=True)
class MultiSampleConfig:
    """copies: M. network: of M·C channels, its sigmas those of the mean. ValueError names the field and the value."""

    copies: int
    network: ModelConfig
    architecture = "MultiSample"

    def __post_init__(self) -> None:
        _check_copies(self.copies)
        if self.network.channels % self.copies:
            raise ValueError(f"network must have channels for {self.copies} copies, got {self.network.channels}")

    plan = property(lambda self: self.network.plan)

    def build(self) -> MeanScore:
        network = self.network.build()
        model = MeanScore(MultiSample(network, self.copies))
        model.plan = network.plan
        return model

    def to_json(self) -> str:
        network = json.loads(self.network.to_json())
        return json.dumps({"architecture": self.architecture, "copies": self.copies, "network": network})

    @classmethod
    def from_dict(cls, fields: Mapping) -> MultiSampleConfig:
        if fields.keys() != {"architecture", "copies", "network"}:
            raise ValueError(f"config must have architecture, copies and network, got {', '.join(map(str, fields))}")
        return cls(fields["copies"], ModelConfig.from_dict(fields["network"]))


class MultiSample(nn.Module):
    """forward(ys [N, M·C, H, W], level [N]) → x̂ [N, C, H, W]: what objectives.multi_sample trains.

    network(ys, level) → [N, M·C, …], with ``sigmas`` [L], those of the mean; ``sigmas`` here are those of the copies.
    """

    plan, law, front = None, None, None

    def __init__(self, network: nn.Module, copies: int):
        super().__init__()
        self.network, self.copies = network, _check_copies(copies)

    @property
    def sigmas(self) -> Tensor:
        return self.network.sigmas * self.copies**0.5

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        channels, *size = self.network.shape
        return (channels // self.copies, *size)

    @property
    def config(self) -> MultiSampleConfig:
        return MultiSampleConfig(self.copies, dataclasses.replace(self.network.config, plan=self.plan))

    def mean_score(self, ys: Tensor, level: Tensor) -> Tensor:
        """(x̂ − ȳ)/σ² [N, C, …]: the score at ȳ, noise σ, that x̂ amounts to."""
        found = self.network(ys, level)
        return found.view(len(ys), self.copies, -1, *ys.shape[2:]).mean(1)

    def forward(self, ys: Tensor, level: Tensor) -> Tensor:
        mean = ys.view(len(ys), self.copies, -1, *ys.shape[2:]).mean(1)
        variance = self.network.sigmas[level].view(-1, *[1] * (ys.dim() - 1)) ** 2
        return mean + variance * self.mean_score(ys, level)


def _of_the_model(name: str) -> property:
    return property(lambda self: getattr(self.model, name), lambda self, value: setattr(self.model, name, value))


class _View(nn.Module):
    """A score model on the weights of a MultiSample."""

    plan, law, front = (_of_the_model(name) for name in NOTES)

    def __init__(self, model: MultiSample):
        super().__init__()
        self.model = model
        self.train(model.training)

    config = property(lambda self: self.model.config)
    data_range = property(lambda self: range_of(self.model.network))


class MeanScore(_View):
    """forward(x [N, C, H, W], level [N]) → score of x = data + σ·noise: an ordinary score model, for every plan.

    The network is fed M copies whose mean is x. Given the mean, the copies' deviations say nothing of the data: they
    are √M·σ·(z_m − z̄), with the same z for every sample and step, so that the score is a function of x.
    """

    def __init__(self, model: MultiSample):
        super().__init__(model)
        ids = np.arange(model.copies)
        z = noise.fill((model.copies, *model.shape), 0 * ids, ids, 0, noise.STREAM["train"], "normal")
        deviation = model.copies**0.5 * (z - z.mean(0, dtype=np.float64))
        deviation = torch.tensor(deviation.reshape(1, -1, *model.shape[1:]), dtype=torch.float32, device="cpu")
        self.register_buffer("deviation", deviation, persistent=False)  # [1, M·C, H, W]

    sigmas = property(lambda self: self.model.network.sigmas)
    shape = property(lambda self: self.model.shape)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        copies = torch.cat([x] * self.model.copies, 1)
        sigma = self.model.network.sigmas[level].view(-1, *[1] * (x.dim() - 1))
        return self.model.mean_score(copies + sigma * self.deviation, level)

    def at_sigmas(self, sigmas: Sigmas) -> MeanScore:
        other = MultiSample(at_sigmas(self.model.network, sigmas), self.model.copies)
        for name in NOTES:
            setattr(other, name, getattr(self.model, name))
        return MeanScore(other.train(self.training)).to(self.deviation.device)


class JointScore(_View):
    """forward(ys [N, M·C, H, W], level [N]) → (x̂ − y_m)/σ_m² for every copy, σ_m = √M·σ its noise: the score of all
    copies at once. A chain on it ends, after the final denoising, in M times the same x̂; ``x_of(ys)`` is their mean.
    """

    sigmas = property(lambda self: self.model.sigmas)
    shape = property(lambda self: tuple(self.model.network.shape))

    def forward(self, ys: Tensor, level: Tensor) -> Tensor:
        x_hat = torch.cat([self.model(ys, level)] * self.model.copies, 1)
        return (x_hat - ys) / self.model.sigmas[level].view(-1, *[1] * (ys.dim() - 1)) ** 2

    def x_of(self, ys: Tensor) -> Tensor:
        return ys.view(len(ys), self.model.copies, -1, *ys.shape[2:]).mean(1)
