"""The Unet of denoising-diffusion-pytorch, with its checkpoints' names.

Blocks of conv3 → RMSNorm over channels → scale and shift → SiLU; attention with learned keys and values ("memory"),
over pixels or linear (arXiv 1812.01243); down by folding 2×2 pixels into channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.unet_blocks import attention, nearest_2x, positional, sinusoids


class RMSNorm(nn.Module):
    """g·√C·x/‖x‖, the norm over channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = math.sqrt(channels)
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.g * self.scale)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, dropout: float = 0.0):
        super().__init__()
        self.proj, self.norm, self.dropout = nn.Conv2d(c_in, c_out, 3, padding=1), RMSNorm(c_out), nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = self.norm(self.proj(x))
        return self.dropout(F.silu(h if scale is None else h * (scale + 1) + shift))


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, dropout: float = 0.0):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out))
        self.block1, self.block2 = Block(c_in, c_out, dropout), Block(c_out, c_out)
        self.res_conv = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, scale, shift)) + self.res_conv(x)


class LinearAttention(nn.Module):
    """(softmax over features of q)·(softmax over pixels of k)·v; mem_kv [2, heads, features, memories]."""

    def __init__(self, channels: int, heads: int, features: int, memories: int):
        super().__init__()
        hidden, self.heads, self.scale = heads * features, heads, features**-0.5
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, features, memories))
        self.to_qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden, channels, 1), RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        n, height, width = x.shape[0], *x.shape[2:]
        qkv = self.to_qkv(self.norm(x)).reshape(n, 3, self.heads, -1, height * width)
        q, k, v = qkv.unbind(1)
        k = torch.cat([self.mem_kv[0].expand(n, -1, -1, -1), k], dim=-1).softmax(dim=-1)
        v = torch.cat([self.mem_kv[1].expand(n, -1, -1, -1), v], dim=-1)
        context = torch.matmul(v, k.transpose(2, 3))  # [n, heads, of v, of k]
        h = torch.matmul(context, q.softmax(dim=-2) * self.scale)
        return self.to_out(h.reshape(n, -1, height, width))


class Attention(nn.Module):
    """Softmax attention over pixels and memories; mem_kv [2, heads, memories, features]."""

    def __init__(self, channels: int, heads: int, features: int, memories: int):
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, memories, features))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * features, 1, bias=False)
        self.to_out = nn.Conv2d(heads * features, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width = x.shape[0], *x.shape[2:]
        q, k, v = self.to_qkv(self.norm(x)).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        k = torch.cat([self.mem_kv[0].transpose(1, 2).expand(n, -1, -1, -1), k], dim=-1)
        v = torch.cat([self.mem_kv[1].transpose(1, 2).expand(n, -1, -1, -1), v], dim=-1)
        return self.to_out(attention(q, k, v).reshape(n, -1, height, width))


class LearnedSinusoids(nn.Module):
    """t [N] → [t, sin(2π·w·t), cos(2π·w·t)]."""

    def __init__(self, width: int):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(width // 2))

    def forward(self, t: Tensor) -> Tensor:
        return torch.cat([t[:, None], sinusoids(t[:, None] * self.weights * (2 * math.pi))], dim=1)


class Unet(nn.Module):
    """forward(x [N, C, H, W], timestep [N]) → what it predicts: noise, image or v.

    full_attn, attn_heads, attn_dim_head, memories: one entry a size; full: softmax attention, else linear.
    self_condition: takes an estimate of the image beside x; the engine has none, so zeros stand for it, as in training.
    learned_sinusoidal_dim: width of learned sinusoids of the time, None for sines of ``theta``.
    """

    def __init__(
        self,
        dim: int,
        dim_mults: Sequence[int],
        channels: int,
        full_attn: Sequence[bool],
        attn_heads: Sequence[int],
        attn_dim_head: Sequence[int],
        memories: Sequence[int],
        init_dim: int | None = None,
        learned_variance: bool = False,
        self_condition: bool = False,
        learned_sinusoidal_dim: int | None = None,
        theta: float = 10_000,
        image_size: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.channels, self.dim, self.theta, self.image_size = channels, dim, theta, image_size
        self.self_condition, self.learned_variance = self_condition, learned_variance
        widths = [init_dim or dim, *(dim * m for m in dim_mults)]
        emb, learned = 4 * dim, learned_sinusoidal_dim
        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1), widths[0], 7, padding=3)
        first = LearnedSinusoids(learned) if learned else nn.Identity()
        layers = nn.Linear(learned + 1 if learned else dim, emb), nn.GELU(), nn.Linear(emb, emb)
        self.time_mlp = nn.Sequential(first, *layers)

        def attend(i: int, c: int, full: bool) -> nn.Module:
            return (Attention if full else LinearAttention)(c, attn_heads[i], attn_dim_head[i], memories[i])

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        last = len(dim_mults) - 1
        for i in range(len(dim_mults)):
            c, after = widths[i], widths[i + 1]
            if i < last:
                down = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c, after, 1))
            else:
                down = nn.Conv2d(c, after, 3, padding=1)
            blocks = [ResnetBlock(c, c, emb, dropout), ResnetBlock(c, c, emb, dropout)]
            self.downs.append(nn.ModuleList([*blocks, attend(i, c, full_attn[i]), down]))
        c = widths[-1]
        self.mid_block1, self.mid_block2 = ResnetBlock(c, c, emb, dropout), ResnetBlock(c, c, emb, dropout)
        self.mid_attn = attend(last, c, True)
        for i in reversed(range(len(dim_mults))):
            before, c = widths[i], widths[i + 1]
            conv = nn.Conv2d(c, before, 3, padding=1)
            up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv) if i else conv
            blocks = [ResnetBlock(c + before, c, emb, dropout), ResnetBlock(c + before, c, emb, dropout)]
            self.ups.append(nn.ModuleList([*blocks, attend(i, c, full_attn[i]), up]))
        self.final_res_block = ResnetBlock(2 * widths[0], widths[0], emb, dropout)
        self.final_conv = nn.Conv2d(widths[0], channels * (2 if learned_variance else 1), 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if isinstance(self.time_mlp[0], LearnedSinusoids):
            emb = self.time_mlp[0](timestep.to(x.dtype))
        else:
            half = self.dim // 2
            emb = positional(timestep, 2 * half, 1, theta=self.theta).to(x.dtype)
        emb = self.time_mlp[3](self.time_mlp[2](self.time_mlp[1](emb)))
        x = torch.cat([torch.zeros_like(x), x], dim=1) if self.self_condition else x
        x = first = self.init_conv(x)
        skips = []
        for block1, block2, attend, down in self.downs:
            x = block1(x, emb)
            skips.append(x)
            x = block2(x, emb)
            x = attend(x) + x
            skips.append(x)
            x = down(x)
        x = self.mid_block1(x, emb)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, emb)
        for block1, block2, attend, up in self.ups:
            x = block1(torch.cat([x, skips.pop()], dim=1), emb)
            x = block2(torch.cat([x, skips.pop()], dim=1), emb)
            x = attend(x) + x
            x = _up(up, x)
        x = self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), emb))
        return x[:, : self.channels] if self.learned_variance else x


def _up(up: nn.Module, x: Tensor) -> Tensor:
    return up[1](nearest_2x(x)) if isinstance(up, nn.Sequential) else up(x)
