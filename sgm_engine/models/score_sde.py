"""NCSN++ and DDPM++ (Song et al. 2021, arXiv 2011.13456, appendix H), with the names of score_sde's checkpoints.

A U-Net of residual blocks. h = SiLU(GN(x)), resampled where the block changes the size, → conv3 → + Dense(SiLU(emb)) →
SiLU(GN) → conv3; the output is (shortcut(x) + h)/√2. Modules are numbered in the order in which they are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgm_engine.models.score_sde_blocks import EPS, HALF, Attention, Combine, Down, Fourier, Resample, ResBlock, Up
from sgm_engine.models.unet_blocks import group_norm, positional


class NCSNpp(nn.Module):
    """forward(x [N, C, H, W], told [N]) → [N, C, H, W]: the score, or the noise negated, as it was trained.

    told: σ (embedding_type "fourier": sines of ln σ) or a time ("positional"). Arguments are the fields of
    ``config.model`` and ``config.data`` in score_sde. scale_by_sigma divides the output by σ; not centered: data in
    [0, 1], 2·x − 1 inside.
    """

    def __init__(
        self,
        nf: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        image_size: int,
        num_channels: int = 3,
        centered: bool = False,
        conditional: bool = True,
        resamp_with_conv: bool = True,
        fir: bool = False,
        fir_kernel: Sequence[float] = (1, 3, 3, 1),
        skip_rescale: bool = True,
        resblock_type: str = "biggan",
        progressive: str = "none",
        progressive_input: str = "none",
        progressive_combine: str = "sum",
        embedding_type: str = "positional",
        scale_by_sigma: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        _check(resblock_type=resblock_type, progressive=progressive, progressive_input=progressive_input,
               progressive_combine=progressive_combine, embedding_type=embedding_type)  # fmt: skip
        if scale_by_sigma and embedding_type != "fourier":
            raise ValueError("scale_by_sigma with embedding_type 'positional' (told a level's index) is not supported")
        self.centered, self.fourier, self.scale_by_sigma = centered, embedding_type == "fourier", scale_by_sigma
        self.nf, self.conditional, self.skip_rescale, self.ddpm = nf, conditional, skip_rescale, resblock_type == "ddpm"
        self.progressive, self.progressive_input = progressive, progressive_input
        self.fir_taps = tuple(fir_kernel) if fir else (1, 1)
        self.blocks, self.levels = num_res_blocks, len(ch_mult)
        self.attended = [image_size // 2**i in tuple(attn_resolutions) for i in range(self.levels)]
        self.resample = Resample(self.fir_taps)
        self.all_modules = nn.ModuleList()
        add, emb = self.all_modules.append, 4 * nf

        def res(c_in: int, c_out: int, mode: str = "same") -> nn.Module:
            taps = self.fir_taps if mode != "same" else None
            return ResBlock(c_in, c_out, emb if conditional else None, mode, taps, skip_rescale, self.ddpm, dropout)

        def attend(channels: int) -> nn.Module:
            return Attention(channels, skip_rescale)

        if self.fourier:
            add(Fourier(nf))
        if conditional:
            add(nn.Linear(2 * nf if self.fourier else nf, emb))
            add(nn.Linear(emb, emb))
        add(nn.Conv2d(num_channels, nf, 3, padding=1))
        skips, c, pyramid = [nf], nf, num_channels
        for i, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                add(res(c, nf * mult))
                c = nf * mult
                if self.attended[i]:
                    add(attend(c))
                skips.append(c)
            if i < self.levels - 1:
                add(Down(c, fir, self.fir_taps, resamp_with_conv) if self.ddpm else res(c, c, "down"))
                if progressive_input == "input_skip":
                    add(Combine(pyramid, c, progressive_combine))
                    c *= 2 if progressive_combine == "cat" else 1
                elif progressive_input == "residual":
                    add(Down(pyramid, fir, self.fir_taps, True, c))
                    pyramid = c
                skips.append(c)
        for module in (res(c, c), attend(c), res(c, c)):
            add(module)
        for i in reversed(range(self.levels)):
            for _ in range(num_res_blocks + 1):
                add(res(c + skips.pop(), nf * ch_mult[i]))
                c = nf * ch_mult[i]
            if self.attended[i]:
                add(attend(c))
            if progressive != "none":
                last = i == self.levels - 1
                if last or progressive == "output_skip":
                    add(group_norm(c, EPS))
                    add(nn.Conv2d(c, num_channels if progressive == "output_skip" else c, 3, padding=1))
                else:
                    add(Up(pyramid, fir, self.fir_taps, True, c))
                pyramid = c
            if i:
                add(Up(c, fir, self.fir_taps, resamp_with_conv) if self.ddpm else res(c, c, "up"))
        if progressive != "output_skip":
            add(group_norm(c, EPS))
            add(nn.Conv2d(c, num_channels, 3, padding=1))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        modules = iter(self.all_modules)
        take = modules.__next__
        emb = take()(told.to(x.dtype).log()) if self.fourier else positional(told, self.nf, 1)
        if self.conditional:
            emb = F.silu(take()(emb.to(x.dtype)))  # every block takes SiLU of the embedding
            emb = F.silu(take()(emb))
        x = x if self.centered else 2 * x - 1
        h, pyramid = take()(x), x
        skips = [h]
        for i in range(self.levels):
            for _ in range(self.blocks):
                h = take()(h, emb)
                if self.attended[i]:
                    h = take()(h)
                skips.append(h)
            if i < self.levels - 1:
                h = take()(h) if self.ddpm else take()(h, emb)
                if self.progressive_input == "input_skip":
                    pyramid = self.resample.down(pyramid)
                    h = take()(pyramid, h)
                elif self.progressive_input == "residual":
                    h = pyramid = self._merge(take()(pyramid), h)
                skips.append(h)
        h = take()(h, emb)
        h = take()(h)
        h = take()(h, emb)
        image = None
        for i in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = take()(torch.cat([h, skips.pop()], dim=1), emb)
            if self.attended[i]:
                h = take()(h)
            if self.progressive == "output_skip":
                found = take()
                found = take()(F.silu(found(h)))
                image = found if image is None else self.resample.up(image) + found
            elif self.progressive == "residual":
                if image is None:
                    norm = take()
                    image = take()(F.silu(norm(h)))
                else:
                    h = image = self._merge(take()(image), h)
            if i:
                h = take()(h) if self.ddpm else take()(h, emb)
        if self.progressive != "output_skip":
            norm = take()
            image = take()(F.silu(norm(h)))
        return image / told.to(image.dtype)[:, None, None, None] if self.scale_by_sigma else image

    def _merge(self, x: Tensor, h: Tensor) -> Tensor:
        return (x + h) * HALF if self.skip_rescale else x + h


CHOICES = {
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "embedding_type": ("fourier", "positional"),
}


def _check(**given: str) -> None:
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
