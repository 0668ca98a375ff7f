"""SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM) as EDM trains them (arXiv 2206.00364, appendix F), with its names.

Both are F of D = c_skip·x + c_out·F(c_in·x, c_noise): U-Nets over ``enc`` and ``dec``, whose keys hold the size. A
block: h = conv1(SiLU(GN(conv0(SiLU(GN(x))) + affine(emb)))), the shortcut's x is added, then attention over pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.edm_blocks import HALF, ResampledConv, UNetBlock, conv
from sgm_engine.models.unet_blocks import frequencies, group_norm, sinusoids


class FourierEmbedding(nn.Module):
    """told [N] → angles 2π·freqs·told [N, half]; freqs are drawn once and never trained."""

    def __init__(self, half: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(half) * scale)

    def forward(self, told: Tensor) -> Tensor:
        return told[:, None] * (2 * math.pi * self.freqs)


class _Labelled(nn.Module):
    """What both networks are told: noise [N] and labels [N, label_dim] one-hot; None is no class, zeros."""

    def __init__(self, in_channels: int, out_channels: int, img_resolution: int, label_dim: int):
        super().__init__()
        self.in_channels, self.out_channels, self.label_dim = in_channels, out_channels, label_dim
        self.image_size = img_resolution

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.label_dim) if labels is None else labels.to(x.dtype)


def _options(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


class SongUNet(_Labelled):
    """forward(x [N, C, H, W], noise [N], labels [N, label_dim] or None) → F. Arguments are those of the file."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__(in_channels, out_channels, img_resolution, label_dim)
        _options("embedding_type", embedding_type, ("positional", "fourier"))
        _options("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _options("decoder_type", decoder_type, ("standard", "skip"))
        emb, self.noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self.map_noise = FourierEmbedding(self.noise_channels // 2) if embedding_type == "fourier" else None
        self.map_label = nn.Linear(label_dim, self.noise_channels) if label_dim else None
        self.map_augment = (
            nn.Linear(augment_dim, self.noise_channels, bias=False) if augment_dim else None
        )  # training's
        self.map_layer0 = nn.Linear(self.noise_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)

        def block(c_in: int, c_out: int, heads: int = 0, mode: str = "same") -> UNetBlock:
            return UNetBlock(c_in, c_out, emb, heads, mode, resample_filter, dropout=dropout)

        sizes = [img_resolution >> i for i in range(len(channel_mult))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, pyramid, skips = in_channels, in_channels, []
        for i, (size, mult) in enumerate(zip(sizes, channel_mult, strict=True)):
            key, width = f"{size}x{size}", model_channels * mult
            if i == 0:
                c = self._enc(f"{key}_conv", conv(c, width, 3), width, skips)
            else:
                c = self._enc(f"{key}_down", block(c, c, 0, "down"), c, skips)
                if encoder_type == "skip":
                    self.enc[f"{key}_aux_down"] = ResampledConv(pyramid, pyramid, 0, "down", resample_filter)
                    self.enc[f"{key}_aux_skip"] = conv(pyramid, c, 1)
                elif encoder_type == "residual":
                    self.enc[f"{key}_aux_residual"] = ResampledConv(pyramid, c, 3, "down", resample_filter, fused=True)
                    pyramid = c
            for j in range(num_blocks):
                c = self._enc(f"{key}_block{j}", block(c, width, int(size in attn_resolutions)), width, skips)
        for i in reversed(range(len(sizes))):
            size, width = sizes[i], model_channels * channel_mult[i]
            key = f"{size}x{size}"
            if i == len(sizes) - 1:
                self.dec[f"{key}_in0"], self.dec[f"{key}_in1"] = block(c, c, 1), block(c, c)
            else:
                self.dec[f"{key}_up"] = block(c, c, 0, "up")
            for j in range(num_blocks + 1):
                heads = int(j == num_blocks and size in attn_resolutions)
                self.dec[f"{key}_block{j}"] = block(c + skips.pop(), width, heads)
                c = width
            if decoder_type == "skip" or i == 0:
                if decoder_type == "skip" and i < len(sizes) - 1:
                    self.dec[f"{key}_aux_up"] = ResampledConv(out_channels, out_channels, 0, "up", resample_filter)
                self.dec[f"{key}_aux_norm"] = group_norm(c, 1e-6)
                self.dec[f"{key}_aux_conv"] = conv(c, out_channels, 3)

    def _enc(self, name: str, module: nn.Module, channels: int, skips: list[int]) -> int:
        self.enc[name] = module
        skips.append(channels)
        return channels

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.map_noise is None:
            half = self.noise_channels // 2
            angles = noise.float()[:, None] * frequencies(half, 1, noise.device)
        else:
            angles = self.map_noise(noise.to(x.dtype))
        emb = sinusoids(angles).to(x.dtype)
        if self.map_label is not None:
            emb = emb + self.map_label(self._labels(labels, x) * math.sqrt(self.label_dim))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips, pyramid = [], x
        for name, module in self.enc.items():
            if name.endswith("aux_down"):
                pyramid = module(pyramid)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + module(pyramid)
            elif name.endswith("aux_residual"):
                x = skips[-1] = pyramid = (x + module(pyramid)) * HALF
            else:
                x = module(x) if name.endswith("_conv") else module(x, emb)
                skips.append(x)
        image = None
        for name, module in self.dec.items():
            if name.endswith("aux_up"):
                image = module(image)
            elif name.endswith("aux_norm"):
                normed = module(x)
            elif name.endswith("aux_conv"):
                found = module(F.silu(normed))
                image = found if image is None else found + image
            else:
                x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
                x = module(x, emb)
        return image


class DhariwalUNet(_Labelled):
    """ADM as EDM trains it; forward as SongUNet's. 64 channels a head; the embedding scales and shifts norm1."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        super().__init__(in_channels, out_channels, img_resolution, label_dim)
        emb, self.model_channels = model_channels * channel_mult_emb, model_channels
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None  # training's
        self.map_layer0 = nn.Linear(model_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None

        def block(c_in: int, c_out: int, attended: bool = False, mode: str = "same") -> UNetBlock:
            return UNetBlock(c_in, c_out, emb, c_out // 64 if attended else 0, mode, adaptive=True, dropout=dropout)

        sizes = [img_resolution >> i for i in range(len(channel_mult))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, skips = in_channels, []
        for i, (size, mult) in enumerate(zip(sizes, channel_mult, strict=True)):
            key, width = f"{size}x{size}", model_channels * mult
            if i == 0:
                self.enc[f"{key}_conv"] = conv(c, width, 3)
                c = width
            else:
                self.enc[f"{key}_down"] = block(c, c, False, "down")
            skips.append(c)
            for j in range(num_blocks):
                self.enc[f"{key}_block{j}"] = block(c, width, size in attn_resolutions)
                c = width
                skips.append(c)
        for i in reversed(range(len(sizes))):
            size, width = sizes[i], model_channels * channel_mult[i]
            key = f"{size}x{size}"
            if i == len(sizes) - 1:
                self.dec[f"{key}_in0"], self.dec[f"{key}_in1"] = block(c, c, True), block(c, c)
            else:
                self.dec[f"{key}_up"] = block(c, c, False, "up")
            for j in range(num_blocks + 1):
                self.dec[f"{key}_block{j}"] = block(c + skips.pop(), width, size in attn_resolutions)
                c = width
        self.out_norm = group_norm(c, 1e-5)
        self.out_conv = conv(c, out_channels, 3)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        angles = noise.float()[:, None] * frequencies(half, 0, noise.device)
        emb = self.map_layer1(F.silu(self.map_layer0(sinusoids(angles, cos_first=True).to(x.dtype))))
        if self.map_label is not None:
            emb = emb + self.map_label(self._labels(labels, x))
        emb = F.silu(emb)
        skips = []
        for name, module in self.enc.items():
            x = module(x) if name.endswith("_conv") else module(x, emb)
            skips.append(x)
        for name, module in self.dec.items():
            x = module(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))
