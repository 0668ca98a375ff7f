"""UNet2DModel as diffusers saves it, with its names; the arguments are the fields of its config.json.

A residual block: conv2(SiLU(GN(conv1(SiLU(GN(x))) + time_emb_proj(SiLU(emb))))) plus the shortcut's x, all over a
scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.unet_blocks import attention, mean_2x2, nearest_2x, positional

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu}
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


class ResnetBlock(nn.Module):
    """forward(x, emb). mode: "same", "up" (nearest) or "down" (2×2 mean), of h and x before the first convolution."""

    def __init__(self, c_in: int, c_out: int, emb: int, groups: int, eps: float, act, scale_shift: bool = False,
                 mode: str = "same", scale: float = 1.0, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        self.act, self.scale_shift, self.mode, self.scale = act, scale_shift, mode, scale
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        if self.mode != "same":
            resample = mean_2x2 if self.mode == "down" else nearest_2x
            h, x = resample(h), resample(x)
        h, told = self.conv1(h), self.time_emb_proj(self.act(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + told)
        h = self.conv2(self.dropout(self.act(h)))
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.scale == 1 else h / self.scale


class AttentionBlock(nn.Module):
    """(x + to_out(attention of to_q, to_k, to_v of GN(x)))/scale; without GN where groups is None."""

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float, scale: float = 1.0):
        super().__init__()
        self.heads, self.scale = channels // head_dim, scale
        inner = self.heads * head_dim
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        h = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)  # [n, pixels, C]
        q, k, v = (
            to(h).transpose(1, 2).reshape(n, self.heads, -1, h.shape[1]) for to in (self.to_q, self.to_k, self.to_v)
        )
        h = attention(q, k, v).reshape(n, -1, h.shape[1]).transpose(1, 2)
        h = x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)
        return h if self.scale == 1 else h / self.scale


class Downsample(nn.Module):
    """conv3 of stride 2; padding 0 is one row and column of zeros after the last."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(nearest_2x(x))


class _Stage(nn.Module):
    """The blocks of one size: resnets, attentions after each (or none), and what leads to the next size (or None)."""

    def __init__(self, resnets: list, attentions: list, down: nn.Module | None = None, up: nn.Module | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = None if down is None else nn.ModuleList([down])
        self.upsamplers = None if up is None else nn.ModuleList([up])


class UNet2D(nn.Module):
    """forward(x [N, C, H, W], timestep [N], label [N] int64 or None) → what its scheduler's prediction_type says.

    Where out_channels is twice in_channels (a learned variance), the second half is left out.
    """

    def __init__(
        self,
        sample_size: int | Sequence[int],
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ):
        super().__init__()
        _one_of("time_embedding_type", time_embedding_type, ("positional",))
        _one_of("act_fn", act_fn, tuple(ACTIVATIONS))
        _one_of("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift"))
        _one_of("mid_block_type", mid_block_type, ("UNetMidBlock2D", None))
        _one_of("class_embed_type", class_embed_type, (None,))
        _one_of("downsample_type", downsample_type, ("conv", "resnet"))
        _one_of("upsample_type", upsample_type, ("conv", "resnet"))
        size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        self.channels, self.image_size, self.num_classes = in_channels, size, num_class_embeds
        self.center, self.learned_variance = center_input_sample, out_channels == 2 * in_channels
        self.embedded = {"width": block_out_channels[0], "endpoint": freq_shift, "cos_first": flip_sin_to_cos}
        emb, groups, act = time_embedding_dim or 4 * block_out_channels[0], norm_num_groups, ACTIVATIONS[act_fn]
        scale_shift = resnet_time_scale_shift == "scale_shift"
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(block_out_channels[0], emb), "linear_2": nn.Linear(emb, emb)}
        )
        self.class_embedding = nn.Embedding(num_class_embeds, emb) if num_class_embeds else None

        def res(c_in: int, c_out: int, mode: str = "same", scale: float = 1.0) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, emb, groups, norm_eps, act, scale_shift, mode, scale, dropout)

        def attend(c: int) -> AttentionBlock:
            return AttentionBlock(c, attention_head_dim or c, groups, norm_eps)

        last = len(block_out_channels) - 1
        c, skips, downs, ups = block_out_channels[0], [block_out_channels[0]], [], []
        for i, (kind, width) in enumerate(zip(down_block_types, block_out_channels, strict=True)):
            _one_of("down_block_types", kind, DOWN)
            resnets = [res(c if j == 0 else width, width) for j in range(layers_per_block)]
            attentions = [attend(width) for _ in range(layers_per_block)] if kind.startswith("Attn") else []
            inside = kind.startswith("Resnet") or (kind.startswith("Attn") and downsample_type == "resnet")
            down = res(width, width, "down") if inside else Downsample(width, downsample_padding)
            downs.append(_Stage(resnets, attentions, down=down if i < last else None))
            skips += [width] * (layers_per_block + int(i < last))
            c = width
        self.down_blocks = nn.ModuleList(downs)
        self.mid_block = None
        if mid_block_type is not None:
            scale, normed = mid_block_scale_factor, attn_norm_num_groups or (None if scale_shift else groups)
            attentions = [AttentionBlock(c, attention_head_dim or c, normed, norm_eps, scale)] if add_attention else []
            self.mid_block = _Stage([res(c, c, "same", scale), res(c, c, "same", scale)], attentions)
        for i, (kind, width) in enumerate(zip(up_block_types, reversed(block_out_channels), strict=True)):
            _one_of("up_block_types", kind, UP)
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(res(c + skips.pop(), width))
                c = width
            attentions = [attend(width) for _ in resnets] if kind.startswith("Attn") else []
            inside = kind.startswith("Resnet") or (kind.startswith("Attn") and upsample_type == "resnet")
            up = res(width, width, "up") if inside else Upsample(width)
            ups.append(_Stage(resnets, attentions, up=up if i < last else None))
        self.up_blocks = nn.ModuleList(ups)
        self.conv_norm_out = nn.GroupNorm(groups, c, norm_eps)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        found = self.whole(x, timestep, label)
        return found[:, : self.channels] if self.learned_variance else found

    def whole(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """All outputs, the variance's too."""
        emb = self.time_embedding["linear_1"](positional(timestep, **self.embedded).to(x.dtype))
        emb = self.time_embedding["linear_2"](F.silu(emb))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(label)
        h = self.conv_in(2 * x - 1 if self.center else x)
        skips = [h]
        for stage in self.down_blocks:
            for i, block in enumerate(stage.resnets):
                h = block(h, emb)
                h = h if stage.attentions is None else stage.attentions[i](h)
                skips.append(h)
            if stage.downsamplers is not None:
                h = stage.downsamplers[0](h, emb)
                skips.append(h)
        if self.mid_block is not None:
            h = self.mid_block.resnets[0](h, emb)
            h = h if self.mid_block.attentions is None else self.mid_block.attentions[0](h)
            h = self.mid_block.resnets[1](h, emb)
        for stage in self.up_blocks:
            for i, block in enumerate(stage.resnets):
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
                h = h if stage.attentions is None else stage.attentions[i](h)
            if stage.upsamplers is not None:
                h = stage.upsamplers[0](h, emb)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _one_of(name: str, value: object, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
