"""The U-Net of improved-diffusion (arXiv 2102.09672) and ADM (2105.05233, appendix A), with their checkpoints' names.

A residual block: h = conv3(SiLU(GN(x))), + Linear(SiLU(emb)) or GN(h)·(1 + scale) + shift by it, → conv3(SiLU(·)), plus
the shortcut. With ``resblock_updown`` the blocks between two sizes resample inside, otherwise a convolution does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.unet_blocks import attention, mean_2x2, nearest_2x, positional


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-5)


class ResBlock(nn.Module):
    """forward(x, emb [N, 4·ch]). mode: "same", "up" (nearest) or "down" (2×2 mean), of h and x, before conv 0."""

    def __init__(self, c_in: int, emb: int, c_out: int, scale_shift: bool, mode: str = "same", dropout: float = 0.0):
        super().__init__()
        self.mode, self.scale_shift = mode, scale_shift
        self.in_layers = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out if scale_shift else c_out))
        self.out_layers = nn.Sequential(
            norm(c_out), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.in_layers[0](x))
        if self.mode != "same":
            resample = mean_2x2 if self.mode == "down" else nearest_2x
            h, x = resample(h), resample(x)
        h, told = self.in_layers[2](h), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + told)
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[2](F.silu(h)))


class AttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(GN(x)))). new_order: channels are [q|k|v] × heads; legacy: heads × [q|k|v]."""

    def __init__(self, channels: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, channels = x.shape[:2]
        qkv, per_head = self.qkv(self.norm(x).flatten(2)), channels // self.heads
        if self.new_order:
            q, k, v = qkv.reshape(n, 3, self.heads, per_head, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(n, self.heads, 3, per_head, -1).unbind(2)
        h = self.proj_out(attention(q, k, v).reshape(n, channels, -1))
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = nearest_2x(x)
        return x if self.conv is None else self.conv(x)


class ADMUNet(nn.Module):
    """forward(x [N, C, H, W], timestep [N], label [N] int64 or None) → noise [N, C, H, W].

    learn_sigma: the network has 2·C outputs, of which the second C (a variance) are left out. attention_resolutions:
    sizes in pixels. num_head_channels −1: ``num_heads`` heads at every size. num_classes: of labels, None without.
    """

    def __init__(
        self,
        image_size: int,
        num_channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[float],
        attention_resolutions: Sequence[int],
        channels: int = 3,
        num_classes: int | None = None,
        num_heads: int = 4,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        learn_sigma: bool = False,
        conv_resample: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.image_size, self.channels, self.num_channels, self.num_classes = (
            image_size,
            channels,
            num_channels,
            num_classes,
        )
        self.learn_sigma, emb = learn_sigma, 4 * num_channels
        self.time_embed = nn.Sequential(nn.Linear(num_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Embedding(num_classes, emb) if num_classes else None

        def res(c_in: int, c_out: int, mode: str = "same") -> ResBlock:
            return ResBlock(c_in, emb, c_out, use_scale_shift_norm, mode, dropout)

        def attend(c: int, up: bool = False) -> AttentionBlock:
            heads = num_heads_upsample if up and num_heads_upsample != -1 else num_heads
            return AttentionBlock(
                c, heads if num_head_channels == -1 else c // num_head_channels, use_new_attention_order
            )

        c, size = int(channel_mult[0] * num_channels), image_size
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, c, 3, padding=1)])])
        skips = [c]
        for i, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                block = [res(c, int(mult * num_channels))]
                c = int(mult * num_channels)
                block += [attend(c)] if size in attention_resolutions else []
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(c)
            if i < len(channel_mult) - 1:
                down = res(c, c, "down") if resblock_updown else Downsample(c, conv_resample)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(c)
                size //= 2
        self.middle_block = nn.ModuleList([res(c, c), attend(c), res(c, c)])
        self.output_blocks = nn.ModuleList()
        for i, mult in reversed(list(enumerate(channel_mult))):
            for j in range(num_res_blocks + 1):
                block = [res(c + skips.pop(), int(mult * num_channels))]
                c = int(mult * num_channels)
                block += [attend(c, True)] if size in attention_resolutions else []
                if i and j == num_res_blocks:
                    block.append(res(c, c, "up") if resblock_updown else Upsample(c, conv_resample))
                    size *= 2
                self.output_blocks.append(nn.ModuleList(block))
        outputs = 2 * channels if learn_sigma else channels
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, outputs, 3, padding=1))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        found = self.whole(x, timestep, label)
        return found[:, : self.channels] if self.learn_sigma else found

    def whole(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """All outputs, the variance's too."""
        emb = self.time_embed(positional(timestep, self.num_channels, 0, cos_first=True).to(x.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(label)
        h, skips = x, []
        for block in self.input_blocks:
            h = _through(block, h, emb)
            skips.append(h)
        h = _through(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = _through(block, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


def _through(block: nn.ModuleList, h: Tensor, emb: Tensor) -> Tensor:
    for module in block:
        h = module(h, emb) if isinstance(module, ResBlock) else module(h)
    return h
