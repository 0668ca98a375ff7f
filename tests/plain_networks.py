"""NCSN and NCSNv2 as one would write them in plain PyTorch: nothing of this package, formulas as in the papers.

What ``accelerate`` meets in practice: norms as modules of single ops, in-place sums that begin with torch.zeros, means
as four strided slices, bilinear upsampling to a size that is already there. Parameter names are the checkpoints'.
"""

import torch
from torch import nn
from torch.nn import functional as F


class LevelNorm(nn.Module):
    """InstanceNorm++ with γ, α, β looked up by level."""

    def __init__(self, width, levels):
        super().__init__()
        self.width = width
        self.standardise = nn.InstanceNorm2d(width, affine=False, track_running_stats=False)
        self.embed = nn.Embedding(levels, 3 * width)
        self.embed.weight.data[:, : 2 * width].normal_(1, 0.02)
        self.embed.weight.data[:, 2 * width :].zero_()

    def forward(self, x, y):
        mu = torch.mean(x, dim=(2, 3))
        shift = (mu - mu.mean(dim=-1, keepdim=True)) / torch.sqrt(mu.var(dim=-1, keepdim=True) + 1e-5)
        gamma, alpha, beta = self.embed(y).chunk(3, dim=-1)
        h = self.standardise(x) + shift[..., None, None] * alpha[..., None, None]
        return gamma.view(-1, self.width, 1, 1) * h + beta.view(-1, self.width, 1, 1)


class Norm(nn.Module):
    """InstanceNorm++ without level."""

    def __init__(self, width):
        super().__init__()
        self.standardise = nn.InstanceNorm2d(width, affine=False, track_running_stats=False)
        self.alpha = nn.Parameter(torch.empty(width).normal_(1, 0.02))
        self.gamma = nn.Parameter(torch.empty(width).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mu = torch.mean(x, dim=(2, 3))
        shift = (mu - torch.mean(mu, dim=-1, keepdim=True)) / torch.sqrt(torch.var(mu, dim=-1, keepdim=True) + 1e-5)
        h = self.standardise(x) + shift[..., None, None] * self.alpha[..., None, None]
        return self.gamma.view(-1, x.shape[1], 1, 1) * h + self.beta.view(-1, x.shape[1], 1, 1)


def conv(a, b, dilation=1, bias=True, kernel=3):
    return nn.Conv2d(a, b, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=bias)


class Halved(nn.Module):
    """A convolution, then the mean of every 2×2."""

    def __init__(self, a, b, kernel=3):
        super().__init__()
        self.conv = conv(a, b, kernel=kernel)

    def forward(self, x):
        h = self.conv(x)
        return sum([h[:, :, ::2, ::2], h[:, :, 1::2, ::2], h[:, :, ::2, 1::2], h[:, :, 1::2, 1::2]]) / 4.0


class Block(nn.Module):
    def __init__(self, a, b, norm, act, dilation=1, down=False):
        super().__init__()
        self.act, self.conditional = act, norm.conditional
        self.normalize1, self.conv1 = norm(a), conv(a, a, dilation)
        self.normalize2 = norm(a)
        halve = down and dilation == 1
        self.conv2 = Halved(a, b) if halve else conv(a, b, dilation)
        if down:
            self.shortcut = Halved(a, b, kernel=1) if halve else conv(a, b, dilation)
        self.down = down

    def forward(self, x, y):
        more = (y,) if self.conditional else ()
        h = self.conv1(self.act(self.normalize1(x, *more)))
        h = self.conv2(self.act(self.normalize2(h, *more)))
        return (self.shortcut(x) if self.down else x) + h


class RCU(nn.Module):
    def __init__(self, width, blocks, norm, act):
        super().__init__()
        self.blocks, self.act, self.conditional = blocks, act, norm.conditional
        for i in range(blocks):
            for j in range(2):
                if self.conditional:
                    setattr(self, f"{i + 1}_{j + 1}_norm", norm(width))
                setattr(self, f"{i + 1}_{j + 1}_conv", conv(width, width, bias=False))

    def forward(self, x, y):
        for i in range(self.blocks):
            residual = x
            for j in range(2):
                if self.conditional:
                    x = getattr(self, f"{i + 1}_{j + 1}_norm")(x, y)
                x = getattr(self, f"{i + 1}_{j + 1}_conv")(self.act(x))
            x += residual
        return x


class MSF(nn.Module):
    def __init__(self, widths, features, norm):
        super().__init__()
        self.features, self.conditional = features, norm.conditional
        self.convs = nn.ModuleList([conv(w, features) for w in widths])
        if self.conditional:
            self.norms = nn.ModuleList([norm(w) for w in widths])

    def forward(self, xs, y, shape):
        sums = torch.zeros(xs[0].shape[0], self.features, *shape, device=xs[0].device, dtype=xs[0].dtype)
        for i in range(len(self.convs)):
            h = self.norms[i](xs[i], y) if self.conditional else xs[i]
            h = self.convs[i](h)
            h = F.interpolate(h, size=shape, mode="bilinear", align_corners=True)
            sums += h
        return sums


class CRP(nn.Module):
    def __init__(self, width, norm, act):
        super().__init__()
        self.act, self.conditional = act, norm.conditional
        self.convs = nn.ModuleList([conv(width, width, bias=False) for _ in range(2)])
        if self.conditional:
            self.norms = nn.ModuleList([norm(width) for _ in range(2)])
        self.pool = nn.AvgPool2d(5, 1, 2) if self.conditional else nn.MaxPool2d(5, 1, 2)

    def forward(self, x, y):
        x = self.act(x)
        path = x
        for i in range(2):
            path = self.norms[i](path, y) if self.conditional else path
            path = self.convs[i](self.pool(path))
            x = path + x
        return x


class Refine(nn.Module):
    def __init__(self, widths, features, norm, act, last=False):
        super().__init__()
        self.adapt_convs = nn.ModuleList([RCU(w, 2, norm, act) for w in widths])
        self.output_convs = RCU(features, 3 if last else 1, norm, act)
        self.msf = MSF(widths, features, norm) if len(widths) > 1 else None
        self.crp = CRP(features, norm, act)

    def forward(self, xs, y, shape):
        hs = [adapt(x, y) for adapt, x in zip(self.adapt_convs, xs, strict=True)]
        h = self.msf(hs, y, shape) if self.msf is not None else hs[0]
        return self.output_convs(self.crp(h, y), y)


class Network(nn.Module):
    """NCSN (conditional) or NCSNv2."""

    def __init__(self, sigmas, channels, ngf, conditional):
        super().__init__()
        self.conditional = conditional
        levels = len(sigmas)
        norm = (lambda w: LevelNorm(w, levels)) if conditional else (lambda w: Norm(w))
        norm.conditional = conditional
        self.register_buffer("sigmas", sigmas.clone(), persistent=not conditional)
        self.act = act = nn.ELU()
        self.begin_conv, self.end_conv = conv(channels, ngf), conv(ngf, channels)
        self.normalizer = norm(ngf)
        two = 2 * ngf
        self.res1 = nn.ModuleList([Block(ngf, ngf, norm, act), Block(ngf, ngf, norm, act)])
        self.res2 = nn.ModuleList([Block(ngf, two, norm, act, 1, True), Block(two, two, norm, act)])
        self.res3 = nn.ModuleList([Block(two, two, norm, act, 2, True), Block(two, two, norm, act, 2)])
        self.res4 = nn.ModuleList([Block(two, two, norm, act, 4, True), Block(two, two, norm, act, 4)])
        self.refine1 = Refine([two], two, norm, act)
        self.refine2 = Refine([two, two], two, norm, act)
        self.refine3 = Refine([two, two], ngf, norm, act)
        self.refine4 = Refine([ngf, ngf], ngf, norm, act, last=True)

    def forward(self, x, y):
        h = self.begin_conv(2 * x - 1.0)
        layers = []
        for stage in (self.res1, self.res2, self.res3, self.res4):
            for block in stage:
                h = block(h, y)
            layers.append(h)
        one, two, three, four = layers
        ref = self.refine1([four], y, four.shape[2:])
        ref = self.refine2([three, ref], y, three.shape[2:])
        ref = self.refine3([two, ref], y, two.shape[2:])
        ref = self.refine4([one, ref], y, one.shape[2:])
        out = self.end_conv(self.act(self.normalizer(ref, *((y,) if self.conditional else ()))))
        if self.conditional:
            return out
        return out / self.sigmas[y].view(x.shape[0], *([1] * len(x.shape[1:])))
