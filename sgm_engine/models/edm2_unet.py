"""EDM2's U-Net, configuration G (arXiv 2312.02696, figure 21), with the names of its files.

F of D = c_skip·x + c_out·F(c_in·x, ¼ln σ). Without biases and norms of groups: every layer keeps the magnitude of what
it is given. N(v) = v/(rms(v) + 1e-4) over some dimensions:

    weights   w = N(weight)/√fan_in, over all but the outputs (algorithm 1)
    sums      ((1 − t)·a + t·b)/√((1 − t)² + t²) (eq. 88); joins √((Na + Nb)/((1 − t)² + t²))·[(1−t)·a/√Na, t·b/√Nb]
    SiLU      x·sigmoid(x)/0.596 (eq. 81)

A block: x resampled, in the encoder N over channels (eq. 30); y = conv(silu(conv(silu(x))·(gain·linear(emb) + 1)));
x = sum(x, y), t = 0.3; attention over pixels with N of q, k and v by head, summed likewise; clamped to ±256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.unet_blocks import attention, mean_2x2, nearest_2x

EPS = 1e-4


def normalised(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """x/(rms(x) + 1e-4), rms over ``dim``; in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    return x / torch.add(EPS, norm, alpha=math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def weighted_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.hypot(1 - t, t)


def weighted_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a [N, Na, …], b [N, Nb, …] → [N, Na + Nb, …]."""
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    share_a, share_b = (1 - t) / math.sqrt(a.shape[1]), t / math.sqrt(b.shape[1])
    return torch.cat([a * (scale * share_a), b * (scale * share_b)], dim=1)


class Layer(nn.Module):
    """A convolution of size ``kernel``, a linear layer where that is 0; no bias, its weight normalised.

    In training the stored weight is normalised before every use, which bounds its growth (algorithm 1).
    """

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, *[kernel] * (2 if kernel else 0)))

    def forward(self, x: Tensor) -> Tensor:
        rest = tuple(range(1, self.weight.dim()))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalised(self.weight, rest))
        weight = normalised(self.weight, rest) / math.sqrt(self.weight[0].numel())
        return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class FourierFeatures(nn.Module):
    """told [N] → √2·cos(freqs·told + phases) [N, width]: N(0, (2π)²) and U(0, 2π), drawn once (eq. 75)."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, told: Tensor) -> Tensor:
        wide = torch.promote_types(self.freqs.dtype, torch.float32)
        return (told.to(wide)[:, None] * self.freqs.to(wide) + self.phases.to(wide)).cos() * math.sqrt(2)


class Block(nn.Module):
    """forward(x, emb). encoder: the shortcut comes first, then N over channels. heads: of its attention, 0 for none."""

    def __init__(self, c_in, c_out, emb, encoder, heads=0, mode="same", dropout=0.0, balances=(0.3, 0.3), clip=256.0):
        super().__init__()
        self.encoder, self.heads, self.mode, self.clip = encoder, heads, mode, clip
        self.res_balance, self.attn_balance = balances
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Layer(c_out if encoder else c_in, c_out, 3)
        self.emb_linear = Layer(emb, c_out, 0)
        self.dropout = nn.Dropout(dropout)
        self.conv_res1 = Layer(c_out, c_out, 3)
        self.conv_skip = Layer(c_in, c_out, 1) if c_in != c_out else None
        self.attn_qkv = Layer(c_out, 3 * c_out, 1) if heads else None
        self.attn_proj = Layer(c_out, c_out, 1) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.mode != "same":
            x = mean_2x2(x) if self.mode == "down" else nearest_2x(x)
        if self.encoder:
            x = normalised(self._skip(x), 1)
        told = self.emb_gain * self.emb_linear(emb) + 1
        y = silu(self.conv_res0(silu(x)) * told[:, :, None, None])
        y = self.conv_res1(self.dropout(y))
        x = weighted_sum(x if self.encoder else self._skip(x), y, self.res_balance)
        if self.heads:
            # Channels hold q, k and v of one feature side by side.
            qkv = self.attn_qkv(x).flatten(2).reshape(x.shape[0], self.heads, x.shape[1] // self.heads, 3, -1)
            q, k, v = normalised(qkv, 2).unbind(3)
            x = weighted_sum(x, self.attn_proj(attention(q, k, v).reshape(x.shape)), self.attn_balance)
        return x.clamp(-self.clip, self.clip) if self.clip is not None else x

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)


class EDM2UNet(nn.Module):
    """forward(x [N, C, H, W], noise [N], labels [N, label_dim] one-hot or None) → F. Arguments are those of the file.

    labels None: no class, zeros. resample_filter: (1, 1), means of 2×2 pixels, is the published one, and all there is.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
        resample_filter: Sequence[int] = (1, 1),
    ):
        super().__init__()
        if tuple(resample_filter) != (1, 1):
            raise ValueError(f"resample_filter must be (1, 1), got {tuple(resample_filter)}")
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        widths = [model_channels * mult for mult in channel_mult]
        told = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.emb_fourier = FourierFeatures(told)
        self.emb_noise = Layer(told, emb, 0)
        self.emb_label = Layer(label_dim, emb, 0) if label_dim else None

        def block(c_in: int, c_out: int, encoder: bool, attended: bool = False, mode: str = "same") -> Block:
            heads, balances = c_out // channels_per_head if attended else 0, (res_balance, attn_balance)
            return Block(c_in, c_out, emb, encoder, heads, mode, dropout, balances, clip_act)

        sizes = [img_resolution >> i for i in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, skips = img_channels + 1, []
        for i, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            key = f"{size}x{size}"
            if i == 0:
                self.enc[f"{key}_conv"], c = Layer(c, width, 3), width
            else:
                self.enc[f"{key}_down"] = block(c, c, True, mode="down")
            skips.append(c)
            for j in range(num_blocks):
                self.enc[f"{key}_block{j}"], c = block(c, width, True, size in attn_resolutions), width
                skips.append(c)
        for size, width in reversed(list(zip(sizes, widths, strict=True))):
            key = f"{size}x{size}"
            if size == sizes[-1]:
                self.dec[f"{key}_in0"], self.dec[f"{key}_in1"] = block(c, c, False, True), block(c, c, False)
            else:
                self.dec[f"{key}_up"] = block(c, c, False, mode="up")
            for j in range(num_blocks + 1):
                joined = c + skips.pop()
                self.dec[f"{key}_block{j}"], c = block(joined, width, False, size in attn_resolutions), width
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.out_conv = Layer(c, img_channels, 3)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(noise).to(x.dtype))
        if self.emb_label is not None:
            labels = x.new_zeros(x.shape[0], self.label_dim) if labels is None else labels.to(x.dtype)
            emb = weighted_sum(emb, self.emb_label(labels * math.sqrt(self.label_dim)), self.label_balance)
        emb = silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, module in self.enc.items():
            x = module(x) if name.endswith("_conv") else module(x, emb)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(weighted_cat(x, skips.pop(), self.concat_balance) if "_block" in name else x, emb)
        return self.out_conv(x) * self.out_gain
