"""NCSN: the noise-conditional score network of Song & Ermon 2019 (arXiv 1907.05600, appendix A)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from sgm_engine.models.blocks import ConditionalInstanceNormPlus, RefineBlock, ResBlock, conv3x3


class NCSN(nn.Module):
    """RefineNet with CondInstanceNorm++ at every norm site; names and shapes of the original ``CondRefineNetDilated``.

    forward(x [N, C, H, W] in [0, 1] plus noise, level [N] int64) → score [N, C, H, W]. H and W are even.

    sigmas: [L] float32, descending; a buffer that checkpoints of the original do not hold.
    divide_by_sigma: the network output is divided by σ(level), as in NCSNv2 (arXiv 2006.09011, technique 3). The
    published NCSN checkpoints were trained without it.
    """

    def __init__(self, sigmas: Tensor, channels: int = 1, ngf: int = 64, divide_by_sigma: bool = False):
        super().__init__()
        self.register_buffer("sigmas", sigmas.to(torch.float32), persistent=False)
        self.channels, self.ngf, self.divide_by_sigma = channels, ngf, divide_by_sigma
        norm = partial(ConditionalInstanceNormPlus, levels=len(sigmas))
        self.begin_conv = conv3x3(channels, ngf)
        self.res1 = nn.ModuleList([ResBlock(ngf, ngf, norm), ResBlock(ngf, ngf, norm)])
        self.res2 = nn.ModuleList([ResBlock(ngf, 2 * ngf, norm, down=True), ResBlock(2 * ngf, 2 * ngf, norm)])
        self.res3 = _dilated_stage(2 * ngf, 2, norm)
        self.res4 = _dilated_stage(2 * ngf, 4, norm)
        self.refine1 = RefineBlock([2 * ngf], 2 * ngf, norm)
        self.refine2 = RefineBlock([2 * ngf, 2 * ngf], 2 * ngf, norm)
        self.refine3 = RefineBlock([2 * ngf, 2 * ngf], ngf, norm)
        self.refine4 = RefineBlock([ngf, ngf], ngf, norm, last=True)
        self.normalizer = norm(ngf)
        self.end_conv = conv3x3(ngf, channels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.begin_conv(2 * x - 1)
        outputs = []
        for stage in (self.res1, self.res2, self.res3, self.res4):
            for block in stage:
                h = block(h, level)
            outputs.append(h)
        h = self.refine1([outputs[3]], level)
        h = self.refine2([outputs[2], h], level)
        h = self.refine3([outputs[1], h], level)
        h = self.refine4([outputs[0], h], level)
        h = self.end_conv(self.normalizer(h, level, "elu"))
        return h / self.sigmas[level][:, None, None, None] if self.divide_by_sigma else h


def _dilated_stage(channels: int, dilation: int, norm) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResBlock(channels, channels, norm, dilation, down=True),
            ResBlock(channels, channels, norm, dilation),
        ]
    )
