"""RefineNet building blocks of NCSN and NCSNv2, with the parameter names of the original checkpoints.

Every forward takes x [N, C, H, W] and level [N] (int64 index into sigmas); blocks without a norm ignore the level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.kernels import ops, reference

NormFactory = Callable[[int], nn.Module]


def _normal(x: Tensor, mean: float, std: float) -> Tensor:
    """x.normal_(mean, std), but not on the meta device, where it would import torch._dynamo: over a second."""
    return x if x.is_meta else x.normal_(mean, std)


class ConditionalInstanceNormPlus(nn.Module):
    """CondInstanceNorm++ (NCSN, appendix A): row i of ``embed.weight`` [L, 3C] holds γ, α, β of level i."""

    def __init__(self, channels: int, levels: int):
        super().__init__()
        self.channels = channels
        weight = _normal(torch.empty(levels, 3 * channels), 0, 1)  # as nn.Embedding would: one seed, one network
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)
        with torch.no_grad():
            _normal(self.embed.weight[:, : 2 * channels], 1, 0.02)
            self.embed.weight[:, 2 * channels :].zero_()

    def forward(self, x: Tensor, level: Tensor, activation: str = "none") -> Tensor:
        gamma, alpha, beta = self.embed.weight.split(self.channels, dim=1)
        # In training the plain formula runs, so that torch.compile can fuse its forward and its backward.
        plain = self.training or x.dtype == torch.float64  # which the kernels do not compute in
        norm = reference.noise_conditioned_norm if plain else ops.noise_conditioned_norm
        return norm(x, gamma, alpha, beta, level, activation)


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ without level (NCSNv2): γ, α, β [C]; the level is accepted and ignored."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(_normal(torch.empty(channels), 1, 0.02))
        self.gamma = nn.Parameter(_normal(torch.empty(channels), 1, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, level: Tensor, activation: str = "none") -> Tensor:
        plain = x.dtype == torch.float64  # which the kernels do not compute in
        norm = reference.noise_conditioned_norm if plain else ops.noise_conditioned_norm
        return norm(x, self.gamma, self.alpha, self.beta, None, activation)


def conv3x3(c_in: int, c_out: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, bias=bias)


def mean_pool_2x2(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


class ConvMeanPool(nn.Module):
    """Convolution, then a 2×2 mean."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return mean_pool_2x2(self.conv(x))


class PoolConv1x1(nn.Module):
    """1×1 convolution and 2×2 mean; they commute, so the pool goes first at a quarter of the cost."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(mean_pool_2x2(x))


class ResBlock(nn.Module):
    """N → act → conv1 → N → act → conv2, plus shortcut.

    ``down`` widens c_in → c_out in conv2 and in the shortcut: by a 2×2 mean pool where dilation is 1, else dilated and
    at full resolution. Otherwise c_in = c_out and the shortcut is the identity.
    """

    def __init__(self, c_in: int, c_out: int, norm: NormFactory, dilation: int = 1, down: bool = False):
        super().__init__()
        if not down and c_in != c_out:
            raise ValueError(f"ResBlock without down keeps its width, got c_in={c_in}, c_out={c_out}")
        self.normalize1 = norm(c_in)
        self.conv1 = conv3x3(c_in, c_in, dilation)
        self.normalize2 = norm(c_in)
        self.conv2: nn.Module
        self.shortcut: nn.Module | None = None
        if down and dilation == 1:
            self.conv2 = ConvMeanPool(conv3x3(c_in, c_out))
            self.shortcut = PoolConv1x1(c_in, c_out)
        else:
            self.conv2 = conv3x3(c_in, c_out, dilation)
            if down:
                self.shortcut = conv3x3(c_in, c_out, dilation)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv1(self.normalize1(x, level, "elu"))
        h = self.conv2(self.normalize2(h, level, "elu"))
        return h + (x if self.shortcut is None else self.shortcut(x))


class RCUBlock(nn.Module):
    """Residual conv unit: per block, ``stages`` times N → ELU → 3×3 without bias, then + residual. norm None: no N."""

    def __init__(self, channels: int, blocks: int, stages: int, norm: NormFactory | None):
        super().__init__()
        self.blocks, self.stages, self.has_norm = blocks, stages, norm is not None
        for i in range(1, blocks + 1):
            for j in range(1, stages + 1):
                if norm is not None:
                    self.add_module(f"{i}_{j}_norm", norm(channels))
                self.add_module(f"{i}_{j}_conv", conv3x3(channels, channels, bias=False))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        for i in range(1, self.blocks + 1):
            h = x
            for j in range(1, self.stages + 1):
                h = self._modules[f"{i}_{j}_norm"](h, level, "elu") if self.has_norm else F.elu(h)
                h = self._modules[f"{i}_{j}_conv"](h)
            x = x + h
        return x


class MSFBlock(nn.Module):
    """Multi-scale fusion: per input N → 3×3 with bias → bilinear upsampling to the first input's size, summed."""

    def __init__(self, c_ins: list[int], c_out: int, norm: NormFactory | None):
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(c, c_out) for c in c_ins)
        self.norms = nn.ModuleList(norm(c) for c in c_ins) if norm is not None else None

    def forward(self, xs: list[Tensor], level: Tensor) -> Tensor:
        size, total = xs[0].shape[2:], None
        for i, x in enumerate(xs):
            h = self.convs[i](x if self.norms is None else self.norms[i](x, level))
            if h.shape[2:] != size:  # same-size align_corners interpolation is the identity
                h = F.interpolate(h, size=size, mode="bilinear", align_corners=True)
            total = h if total is None else total + h
        return total


class CRPBlock(nn.Module):
    """Chained residual pooling: x = ELU(x), then per stage path = conv(pool5×5(N(path))), x += path.

    With a norm (NCSN) the pool is a mean, padding counted; without one (NCSNv2) a maximum.
    """

    def __init__(self, channels: int, stages: int, norm: NormFactory | None):
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(channels, channels, bias=False) for _ in range(stages))
        self.norms = nn.ModuleList(norm(channels) for _ in range(stages)) if norm is not None else None

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x = path = F.elu(x)
        for i, conv in enumerate(self.convs):
            if self.norms is None:
                path = F.max_pool2d(path, 5, stride=1, padding=2)
            else:
                path = F.avg_pool2d(self.norms[i](path, level), 5, stride=1, padding=2)
            path = conv(path)
            x = x + path
        return x


class RefineBlock(nn.Module):
    """RCU(2) per input → MSF (with two inputs) → CRP → RCU(1; 3 in the last block)."""

    def __init__(self, c_ins: list[int], c_out: int, norm: NormFactory | None, last: bool = False):
        super().__init__()
        self.adapt_convs = nn.ModuleList(RCUBlock(c, 2, 2, norm) for c in c_ins)
        self.msf = MSFBlock(c_ins, c_out, norm) if len(c_ins) > 1 else None
        self.crp = CRPBlock(c_out, 2, norm)
        self.output_convs = RCUBlock(c_out, 3 if last else 1, 2, norm)

    def forward(self, xs: list[Tensor], level: Tensor) -> Tensor:
        hs = [adapt(x, level) for adapt, x in zip(self.adapt_convs, xs, strict=True)]
        h = hs[0] if self.msf is None else self.msf(hs, level)
        return self.output_convs(self.crp(h, level), level)
