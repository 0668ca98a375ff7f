"""NCSN (Song & Ermon 2019, arXiv 1907.05600, appendix A) and NCSNv2 (2020, arXiv 2006.09011).

Parameters are named as in the original checkpoints. All are one RefineNet: an encoder of residual stages, then refine
blocks that walk back up. They differ in two tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgm_engine.models.blocks import ConditionalInstanceNormPlus, InstanceNormPlus, RefineBlock, ResBlock, conv3x3
from sgm_engine.models.config import ModelConfig, architecture
from sgm_engine.outputs.images import UNIT
from sgm_engine.plans.front import Front
from sgm_engine.plans.law import DataLaw
from sgm_engine.plans.schedule import check_sigmas


class Stage(NamedTuple):
    """Two residual blocks; widths in units of ngf. ``down`` (first block): 2×2 mean if dilation is 1, else dilated."""

    name: str
    c_in: int
    c_out: int
    dilation: int = 1
    down: bool = True


class Refine(NamedTuple):
    """One refine block over the stage's output and the refine block before it (none for the first)."""

    name: str
    stage: str
    c_in: int
    c_out: int


class RefineNet(nn.Module):
    """forward(x [N, C, H, W] in [0, 1] plus noise, level [N] int64) → score [N, C, H, W]. H and W divide by 2^pools.

    sigmas: [L], descending, kept as a float32 buffer. image_size: what the network samples by default, in pixels; it is
    convolutional and takes other sizes. plan: the sampling plan's arguments that came with the weights, or None.
    """

    law: DataLaw | None = None  # of the data, where it came with the weights
    front: Front | None = None  # tuned plans, likewise
    stages: tuple[Stage, ...]
    refines: tuple[Refine, ...]
    conditional: bool  # InstanceNorm++ by level at every site; otherwise without level and in the encoder only

    def __init__(
        self, sigmas: Tensor | Sequence[float], channels: int, ngf: int, divide_by_sigma: bool, image_size: int
    ):
        super().__init__()
        values = torch.tensor(check_sigmas(sigmas), dtype=torch.float32, device="cpu")  # even under a meta device
        self.register_buffer("sigmas", values, persistent=not self.conditional)
        self.channels, self.ngf, self.divide_by_sigma = channels, ngf, divide_by_sigma
        self.image_size, self.plan, self.data_range = image_size, None, UNIT
        norm = partial(ConditionalInstanceNormPlus, levels=len(values)) if self.conditional else InstanceNormPlus
        self.begin_conv = conv3x3(channels, ngf)
        for s in self.stages:
            first = ResBlock(s.c_in * ngf, s.c_out * ngf, norm, s.dilation, s.down)
            second = ResBlock(s.c_out * ngf, s.c_out * ngf, norm, s.dilation)
            self.add_module(s.name, nn.ModuleList([first, second]))
        for i, r in enumerate(self.refines):
            inputs = [r.c_in * ngf] * (2 if i else 1)
            last = r is self.refines[-1]
            self.add_module(r.name, RefineBlock(inputs, r.c_out * ngf, norm if self.conditional else None, last))
        self.normalizer = norm(ngf)
        self.end_conv = conv3x3(ngf, channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return self.channels, self.image_size, self.image_size

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            architecture=type(self).__name__,
            channels=self.channels,
            image_size=self.image_size,
            ngf=self.ngf,
            sigmas=tuple(self.sigmas.tolist()),
            divide_by_sigma=self.divide_by_sigma,
            plan=self.plan,
            data_range=self.data_range,
        )

    @classmethod
    def size_divisor(cls) -> int:
        """Image sizes divide by this: 2 for each pooled stage."""
        return 2 ** sum(s.down and s.dilation == 1 for s in cls.stages)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.begin_conv(2 * x - 1)
        outputs = {}
        for stage in self.stages:
            for block in self._modules[stage.name]:
                h = block(h, level)
            outputs[stage.name] = h
        for i, refine in enumerate(self.refines):
            skip = outputs[refine.stage]
            h = self._modules[refine.name]([skip, h] if i else [skip], level)
        h = self.end_conv(self.normalizer(h, level, "elu"))
        return h / self.sigmas[level][:, None, None, None] if self.divide_by_sigma else h


@architecture
class NCSN(RefineNet):
    """The original ``CondRefineNetDilated``: InstanceNorm++ conditioned on the level at all 71 norm sites, raw output.

    The published checkpoints hold no ``sigmas`` and were trained without divide_by_sigma (technique 3 of NCSNv2).
    """

    conditional = True
    stages = (
        Stage("res1", 1, 1, down=False),
        Stage("res2", 1, 2),
        Stage("res3", 2, 2, dilation=2),
        Stage("res4", 2, 2, dilation=4),
    )
    refines = (
        Refine("refine1", "res4", 2, 2),
        Refine("refine2", "res3", 2, 2),
        Refine("refine3", "res2", 2, 1),
        Refine("refine4", "res1", 1, 1),
    )

    def __init__(
        self,
        sigmas: Tensor | Sequence[float],
        channels: int = 1,
        ngf: int = 64,
        divide_by_sigma: bool = False,
        image_size: int = 28,
    ):
        super().__init__(sigmas, channels, ngf, divide_by_sigma, image_size)


@architecture
class NCSNv2(RefineNet):
    """Unconditional network, 17 norm sites, output divided by σ(level): CIFAR-10 (32 px) and CelebA (64 px)."""

    stages, refines, conditional = NCSN.stages, NCSN.refines, False

    def __init__(self, sigmas: Tensor | Sequence[float], channels: int = 3, ngf: int = 128, image_size: int = 32):
        super().__init__(sigmas, channels, ngf, True, image_size)


@architecture
class NCSNv2Deeper(NCSNv2):
    """One more pooled stage and 4·ngf at the bottom: LSUN at 96 and 128 px."""

    stages = (
        Stage("res1", 1, 1, down=False),
        Stage("res2", 1, 2),
        Stage("res3", 2, 2),
        Stage("res4", 2, 4, dilation=2),
        Stage("res5", 4, 4, dilation=4),
    )
    refines = (
        Refine("refine1", "res5", 4, 4),
        Refine("refine2", "res4", 4, 2),
        Refine("refine3", "res3", 2, 2),
        Refine("refine4", "res2", 2, 1),
        Refine("refine5", "res1", 1, 1),
    )


@architecture
class NCSNv2Deepest(NCSNv2):
    """NCSNv2Deeper with one more pooled stage, res31 and refine31: FFHQ at 256 px."""

    stages = (*NCSNv2Deeper.stages[:3], Stage("res31", 2, 2), *NCSNv2Deeper.stages[3:])
    refines = (*NCSNv2Deeper.refines[:2], Refine("refine31", "res31", 2, 2), *NCSNv2Deeper.refines[2:])
