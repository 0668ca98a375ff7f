"""Small networks that write the same things in the ways that people write them, for tests of what is recorded."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

C = 16


class Around(nn.Module):
    """last(h + middle(h)) with h = first(x); middle is a function, held as an attribute, of (this module, h, level)."""

    shape = (3, 8, 8)

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.middle = middle
        self.register_buffer("sigmas", torch.tensor([1.0, 0.5, 0.2, 0.1]))
        self.first, self.last = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 3, 3, padding=1)
        self.norm, self.layer_norm = nn.GroupNorm(4, C), nn.LayerNorm(C)
        self.instance_norm = nn.InstanceNorm2d(C, affine=True)
        self.qkv, self.qkv_tokens = nn.Conv2d(C, 3 * C, 1), nn.Conv1d(C, 3 * C, 1)
        self.to_q, self.to_k, self.to_v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.heads = nn.MultiheadAttention(C, 2, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(C, C) / 4)
        self.wide, self.narrow, self.told = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.Linear(1, C)
        self.three = nn.Conv2d(C, C, 3)
        self.memory = nn.Parameter(torch.randn(2, 2, C // 2, 3))
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.05 * torch.randn_like(p))

    def forward(self, x, level):
        h = self.first(x)
        return self.last(h + self.middle(self, h, level))


def einsum_over_pixels(m, h, level):
    n, c, height, width = h.shape
    q = m.norm(h)
    k = torch.einsum("bhwc,cd->bhwd", q.permute(0, 2, 3, 1), m.matrix).permute(0, 3, 1, 2)
    w = torch.einsum("bchw,bcij->bhwij", q, k) * int(c) ** -0.5
    w = F.softmax(w.reshape(n, height, width, height * width), dim=-1).reshape(n, height, width, height, width)
    return torch.einsum("bhwij,bcij->bchw", w, k)


def heads_outside(m, h, level):
    n, c, height, width = h.shape
    qkv = m.qkv_tokens(m.norm(h.reshape(n, c, -1)))
    q, k, v = qkv.reshape(n * 2, 3 * c // 2, -1).split(c // 2, dim=1)
    scale = (c // 2) ** -0.25
    w = torch.einsum("bct,bcs->bts", q * scale, k * scale).float().softmax(dim=-1)
    return torch.einsum("bts,bcs->bct", w, v).reshape(n, -1, height, width)


def heads_interleaved(m, h, level):
    n, c, height, width = h.shape
    q, k, v = m.qkv(m.norm(h)).reshape(n * 2, c // 2, 3, height * width).unbind(2)
    w = torch.einsum("ncq,nck->nqk", q.float(), (k / np.sqrt(k.shape[1])).float()).softmax(dim=2)
    return torch.einsum("nqk,nck->ncq", w, v).reshape(n, c, height, width)


def linear_layers(m, h, level):
    n, c, height, width = h.shape
    tokens = h.flatten(2).transpose(1, 2)
    q, k, v = (to(tokens).view(n, -1, 2, c // 2).transpose(1, 2) for to in (m.to_q, m.to_k, m.to_v))
    found = F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    return m.to_q(found.transpose(1, 2).reshape(n, -1, c)).transpose(1, 2).view(n, c, height, width)


def transformer(m, h, level):
    tokens = h.flatten(2).swapaxes(1, 2)
    y = m.layer_norm(tokens)
    a = m.heads(y, y, y)[0] + tokens
    a = m.narrow(F.gelu(m.wide(m.layer_norm(a)))) + a
    return a.swapaxes(2, 1).view(h.shape)


def linear_attention(m, h, level):
    from einops import rearrange, repeat

    q, k, v = (rearrange(t, "b (h c) x y -> b h c (x y)", h=2) for t in m.qkv(h).chunk(3, dim=1))
    mk, mv = (repeat(t, "h c n -> b h c n", b=len(h)) for t in m.memory)
    k, v = torch.cat((mk, k), dim=-1), torch.cat((mv, v), dim=-1)
    q, k = q.softmax(dim=-2) * 0.3, k.softmax(dim=-1)
    out = torch.einsum("b h d e, b h d n -> b h e n", torch.einsum("b h d n, b h e n -> b h d e", k, v), q)
    return rearrange(out, "b h c (x y) -> b (h c) x y", x=h.shape[2])


def _of_heads(m, h):
    n, c, height, width = h.shape
    return m.qkv(h).reshape(n, 3, 2, c // 2, height * width).transpose(3, 4).unbind(1)


def remembered_attention(m, h, level):
    """Constant keys and values before the pixels'; torch.sdpa scales keys that hold both."""
    (q, k, v), memory = _of_heads(m, h), m.memory.transpose(2, 3).unsqueeze(1).expand(-1, len(h), -1, -1, -1)
    k, v = torch.cat((memory[0], k), dim=2), torch.cat((memory[1], v), dim=2)
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(h.shape)


def scaled_before_it_remembers(m, h, level):
    """Of keys and values that are scaled alone, the constants before them are not."""
    (q, k, v), memory = _of_heads(m, h), m.memory.transpose(2, 3).unsqueeze(1).expand(-1, len(h), -1, -1, -1)
    k, v = torch.cat((memory[0], 0.3 * k), dim=2), torch.cat((memory[1], 2 * v), dim=2)
    return ((q @ k.transpose(2, 3)).softmax(-1) @ (0.5 * v)).transpose(2, 3).reshape(h.shape)


def space_to_depth(m, h, level):
    from einops import rearrange

    blocks = rearrange(h, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    weight = m.wide.weight.t()[:, :, None, None]
    return F.interpolate(F.conv2d(blocks, weight), scale_factor=2) + F.interpolate(
        F.conv2d(F.pixel_unshuffle(h, 2), weight), scale_factor=2
    )


def by_reshape(m, h, level):
    c, height, width = h.shape[1:]
    small = h.reshape(-1, c, height // 2, 2, width // 2, 2).mean((3, 5))
    return small.reshape(-1, c, height // 2, 1, width // 2, 1).repeat(1, 1, 1, 2, 1, 2).reshape(-1, c, height, width)


def filtered(m, h, level):
    """A filter [1, 3, 3, 1] down and up, channels as images of one channel; the same as StyleGAN's."""
    n, c, height, width = h.shape
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    taps = (torch.outer(taps, taps) / 64)[None, None]
    down = F.conv2d(F.pad(h.reshape(n * c, 1, height, width), (1, 1, 1, 1)), taps)[:, :, ::2, ::2]
    up = down.reshape(-1, height // 2, 1, width // 2, 1, 1)
    up = F.pad(up, [0, 0, 0, 1, 0, 0, 0, 1]).reshape(-1, 1, height, width)
    return F.conv2d(F.pad(up, (2, 1, 2, 1)), 4 * taps).reshape(n, c, height, width)


def channel_norms(m, h, level):
    gain = m.matrix[0][:, None, None]
    mean, var = h.mean(1, keepdim=True), h.var(1, unbiased=False, keepdim=True)
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=torch.float32)
    norm = torch.add(1e-4, norm, alpha=np.sqrt(norm.numel() / h.numel()))
    rms = h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6) * gain
    return (h - mean) / (var + 1e-5).sqrt() * gain + h / norm + rms + F.normalize(h, dim=1) * gain * C**0.5


def in_place(m, h, level):
    y = m.norm(h)
    y *= 2
    y += m.told(level[:, None].float())[:, :, None, None]
    return F.silu(y, inplace=True)


def borders(m, h, level):
    return sum(m.three(F.pad(h, (1, 1, 1, 1), mode=mode)) for mode in ("circular", "reflect", "replicate"))


def sinusoids_in_place(m, h, level):
    table = torch.zeros(len(h), C, dtype=torch.float64)
    table[:, 0::2] = torch.sin(level[:, None] * torch.arange(C // 2, dtype=torch.float64))
    table[:, 1::2] = torch.cos(level[:, None] * torch.arange(C // 2))
    return (h + m.to_q(table.float())[:, :, None, None]) * torch.sqrt(level.double() + 1).float()[:, None, None, None]


def by_shape(m, h, level):
    def act(y):
        return y * torch.sigmoid(y)

    h = (h + act(m.norm(h))) * np.sqrt(0.5)
    return checkpoint(act, h, use_reentrant=False) if h.shape[-1] % 2 == 0 else h


def weights_normalised(m, h, level):
    weight = m.three.weight / m.three.weight.flatten(1).norm(dim=1)[:, None, None, None]
    return F.conv2d(F.relu(m.instance_norm(h)), weight, padding=1)


def transposed(m, h, level):
    small = F.silu(m.norm(h))[:, :, ::2, ::2]
    return F.conv_transpose2d(small, m.three.weight, stride=2, padding=1, output_padding=1)


def maxima_and_bilinear(m, h, level):
    small = F.max_pool2d(F.gelu(F.group_norm(h, 1)), 2)
    return F.interpolate(small, scale_factor=2, mode="bilinear") + F.interpolate(
        small, scale_factor=2, mode="bilinear", align_corners=True
    )


def told_at_every_pixel(m, h, level):
    """A class beside the channels, and an embedding repeated to the size of the image."""
    told = m.told(level[:, None].float())
    beside = told[:, :, None, None].expand(-1, -1, h.shape[2], h.shape[3])
    weight = torch.cat([m.matrix, m.matrix.t(), m.matrix], dim=1)[:, :, None, None]
    h = F.conv2d(torch.cat([beside, h, torch.ones_like(h)], dim=1), weight)
    return h + told[:, :, None, None].repeat(1, 1, *h.shape[2:])


def magnitude_preserving(m, h, level):
    """Normalised weights and pixels, q, k and v normalised by head, sums by lerp, as in EDM2."""
    n, _, height, width = h.shape

    def normalised(x, dim):
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
        return x / torch.add(1e-4, norm, alpha=np.sqrt(norm.numel() / x.numel())).to(x.dtype)

    y = normalised(h, 1)
    y = y.lerp(F.conv2d(F.silu(y) / 0.596, normalised(m.three.weight, [1, 2, 3]), padding=1), 0.3) / np.sqrt(0.58)
    q, k, v = normalised(m.qkv(y).reshape(n, 2, -1, 3, height * width), 2).unbind(3)
    w = torch.einsum("nhcq,nhck->nhqk", q, k / np.sqrt(q.shape[2])).softmax(dim=3)
    return torch.einsum("nhqk,nhck->nhcq", w, v).reshape(h.shape).clip_(-256, 256)


MIDDLES = [
    einsum_over_pixels, heads_outside, heads_interleaved, linear_layers, transformer, linear_attention,
    remembered_attention, scaled_before_it_remembers,
    space_to_depth, by_reshape, filtered, channel_norms, in_place, borders, sinusoids_in_place, by_shape,
    weights_normalised, transposed, maxima_and_bilinear, told_at_every_pixel,
    magnitude_preserving,
]  # fmt: skip
